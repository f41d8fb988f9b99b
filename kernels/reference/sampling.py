"""Sampling and speculative verification in plain PyTorch, float64: the specification of `kernels.sampling`.

A token is drawn by an exponential race: of independent E_i ~ Exp(1), argmax p_i / E_i is i with probability p_i. It is
run in two heats, among groups of 32 neighbouring tokens by the groups' sums, then within the winning group. That gives
the same distribution, P(group) · P(token | group), and the pass over the vocabulary needs sums only, no random numbers.

Random numbers are a function of what they are for, Philox-4x32-10 (Salmon et al., SC 2011) of

    key      the request's seed, 64 bits
    counter  index (a group, a token, or 0), position in the text (64 bits), 4 · stream + purpose

so a request's text depends on nothing else in its batch. `stream` keeps a draft model's choice of the token at a
position (stream 1) independent of the target model's (stream 0); verification is only exact if they are.
"""

import torch

GROUP = 32  # tokens of the second heat
GREEDY_BELOW = 1e-5  # temperatures below it count as 0

# What a random number is for.
GROUP_RACE, TOKEN_RACE, ACCEPT = 0, 1, 2

_MASK = 0xFFFFFFFF


# ---- random numbers ------------------------------------------------------------------------------------------------


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10. Four counter words and two key words in, four random words out, each a uint32 in an int64.

    A product of two words overflows int64, but wraps around, and its 64 bits are the right ones.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (product1 >> 32 & _MASK) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = (product0 >> 32 & _MASK) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def random_bits(
    seeds: torch.Tensor, positions: torch.Tensor, indices: torch.Tensor, purpose: int, stream: int
) -> torch.Tensor:
    """32 random bits, as int64, for each of the arguments broadcast against one another."""
    zero = torch.zeros_like(seeds + positions + indices)
    words = (indices, positions & _MASK, positions >> 32 & _MASK, 4 * stream + purpose)
    return philox(tuple(zero + word for word in words), (zero + (seeds & _MASK), zero + (seeds >> 32 & _MASK)))[0]


def exponentials(bits: torch.Tensor) -> torch.Tensor:
    """Exp(1) numbers from random bits. Small ones, which win races, are as finely spaced as the bits allow."""
    return -torch.log1p(-(bits.double() + 0.5) * 2.0**-32)


def uniforms(bits: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1 − 2⁻²³]: even in float32, u · q < q for every q > 0, so equal probabilities never reject."""
    return (bits >> 9).double() * 2.0**-23


# ---- distributions -------------------------------------------------------------------------------------------------


def processed_probs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """The distribution that a token is drawn from, float64 [num_rows, vocab].

    In this order: divide by the temperature; keep the top_k largest; of these the fewest largest whose mass is at least
    top_p of theirs; drop what is less than min_p times as likely as the most likely token; normalise. Each of the three
    keeps all tokens from some logit on, so tokens with equal logits stay or go together: k tokens may become more.

    Args:
        logits: [num_rows, vocab].
        temperature: [num_rows]; below 1e-5 all mass goes to the largest logit, the first of equals.
        top_k: [num_rows], 0 for off.
        top_p: [num_rows], 1.0 for off.
        min_p: [num_rows], 0.0 for off.
    """
    vocab = logits.shape[1]
    greedy = temperature < GREEDY_BELOW
    scaled = logits.double() / torch.where(greedy, 1.0, temperature.double())[:, None]
    kept = torch.ones_like(scaled, dtype=torch.bool)
    descending = scaled.sort(dim=1, descending=True).values
    if top_k is not None:
        k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long()
        kept &= scaled >= descending.gather(1, k[:, None] - 1)
    if top_p is not None:
        descending = torch.where(kept, scaled, -torch.inf).sort(dim=1, descending=True).values
        mass_up_to = descending.softmax(1).cumsum(1)
        needed = (mass_up_to < top_p.double()[:, None]).sum(1, keepdim=True).clamp(max=vocab - 1)
        kept &= (scaled >= descending.gather(1, needed)) | (top_p >= 1)[:, None]
    if min_p is not None:
        kept &= (scaled - scaled.amax(1, keepdim=True)).exp() >= min_p.double()[:, None]
    probs = torch.where(kept, scaled, -torch.inf).softmax(1)
    best = torch.nn.functional.one_hot(logits.double().argmax(1), vocab).double()
    return torch.where(greedy[:, None], best, probs)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of one token per row at temperature 1, unfiltered: float64 [num_rows]."""
    return logits.double().log_softmax(1).gather(1, tokens.long()[:, None])[:, 0]


# ---- drawing -------------------------------------------------------------------------------------------------------


def race(weights: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Draw an index of each row with probability proportional to `weights` [num_rows, vocab]: int64 [num_rows]."""
    num_groups = -(-weights.shape[1] // GROUP)
    grouped = torch.nn.functional.pad(weights, (0, num_groups * GROUP - weights.shape[1])).unflatten(1, (-1, GROUP))
    seeds, positions = seeds.long()[:, None], positions.long()[:, None]

    def winner(weight: torch.Tensor, indices: torch.Tensor, purpose: int) -> torch.Tensor:
        scores = weight / exponentials(random_bits(seeds, positions, indices, purpose, stream))
        return scores.argmax(1, keepdim=True)

    group = winner(grouped.sum(2), torch.arange(num_groups, device=weights.device)[None], GROUP_RACE)
    tokens = group * GROUP + torch.arange(GROUP, device=weights.device)
    members = grouped.gather(1, group[..., None].expand(-1, 1, GROUP))[:, 0]
    return tokens.gather(1, winner(members, tokens, TOKEN_RACE))[:, 0]


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    stream: int = 0,
) -> torch.Tensor:
    """One token per row, int64 [num_rows], from `processed_probs`.

    Args:
        seeds: int64 [num_rows], the requests' seeds.
        positions: int64 [num_rows], where in its text each token will stand.
        stream: 0 for the model that decides, 1 for a draft model.
    """
    return race(processed_probs(logits, temperature, top_k, top_p, min_p), seeds, positions, stream)


def verify(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    draft_lens: torch.Tensor,
    target_probs: torch.Tensor,
    *,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

    With x_i the drafts of a sequence, q_i their distributions and p_i the target's: accept x_i if u_i · q_i(x_i) <
    p_i(x_i); at the first rejection draw from max(0, p_i − q_i) instead; if there is none, draw one more from p. What
    comes out is distributed as if drawn from p token by token. Should max(0, p − q) be zero everywhere, which only
    rounding can do after a rejection, p and q agree and the draft is emitted.

    Args:
        draft_tokens: [num_seqs, k].
        draft_probs: [num_seqs, k, vocab], or None for drafts that were not drawn at random: q is 1 at the draft.
        draft_lens: [num_seqs], drafts that each sequence has, 0 to k.
        target_probs: [num_seqs, k + 1, vocab], from `processed_probs`.
        seeds: int64 [num_seqs].
        positions: int64 [num_seqs], where the first emitted token of each sequence will stand.

    Returns:
        tokens, int64 [num_seqs, k + 1], with −1 behind the last; and how many were emitted, int32 [num_seqs].
    """
    num_seqs, k = draft_tokens.shape
    tokens = torch.full((num_seqs, k + 1), -1, dtype=torch.int64, device=draft_tokens.device)
    num_emitted = torch.zeros(num_seqs, dtype=torch.int32, device=draft_tokens.device)
    for b in range(num_seqs):
        num_drafts, seed, position = int(draft_lens[b]), seeds[b : b + 1], positions[b : b + 1]
        zero = torch.zeros_like(seed)
        accepted, weights = 0, None
        while accepted < num_drafts and weights is None:
            x, p = int(draft_tokens[b, accepted]), target_probs[b, accepted].double()
            if draft_probs is None:
                q = torch.nn.functional.one_hot(draft_tokens[b, accepted].long(), p.shape[0]).double()
            else:
                q = draft_probs[b, accepted].double()
            u = uniforms(random_bits(seed, position + accepted, zero, ACCEPT, 0))
            if u * q[x] < p[x]:
                tokens[b, accepted] = x
                accepted += 1
            else:
                weights = (p - q).clamp(min=0)
        if weights is None:
            weights = target_probs[b, accepted].double()
        if weights.any() or accepted == num_drafts:
            tokens[b, accepted] = race(weights[None], seed, position + accepted)
        else:
            tokens[b, accepted] = draft_tokens[b, accepted]
        num_emitted[b] = accepted + 1
    return tokens, num_emitted
