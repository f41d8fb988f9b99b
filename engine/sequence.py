"""A request with its tokens: what the scheduler's `Request` leaves out because the simulator has none."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Hashable
from collections.abc import Sequence as Many

from engine.errors import UserError
from engine.sampling_params import SamplingParams
from engine.scheduling import Request
from engine.values import shown

_DIGEST_BYTES = 16


class Sequence(Request):
    """One prompt and what follows it.

    Attributes:
        token_ids: the prompt and the output tokens that have reached the host.
        params: how it is sampled.
        stop_ids: tokens that end it: the model's end of text (unless ignored) and the request's own.
        seed: of its random numbers, 0 to 2^63 - 1.
        slot: its row of the runner's per-sequence state; -1 while it has none.
        arrival_s, first_scheduled_s, first_token_s, last_token_s: on the clock of time.perf_counter; None until it
            happens. Tokens count as soon as they are on the host.
    """

    __slots__ = (
        "_hashes_blocks",
        "arrival_s",
        "block_size",
        "first_scheduled_s",
        "first_token_s",
        "last_token_s",
        "params",
        "seed",
        "slot",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        request_id: Hashable,
        prompt_token_ids: Many[int],
        params: SamplingParams,
        *,
        max_model_len: int,
        eos_token_ids: Collection[int] = (),
        block_size: int = 64,
        hash_blocks: bool = False,
        default_seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            request_id: unique in the engine. Where params has no seed, the seed comes from it and default_seed.
            prompt_token_ids: at least 1 token, and at most max_model_len - 1, so that there is room for one more.
            params: see the class.
            max_model_len: prompt and output together.
            eos_token_ids: the model's end of text.
            block_size: tokens per KV block.
            hash_blocks: keep block_hashes, for the prefix cache.
            default_seed: the engine's seed.
            vocab_size: rows of the embedding table, to check ids of the prompt and of logit_bias; None if the caller
                has.

        Raises:
            UserError: an empty prompt, one that is too long, or an id that is no token of the model.
        """
        check_prompt(prompt_token_ids, max_model_len, vocab_size)
        if vocab_size is not None:
            check_bias(params, vocab_size)
        room = max_model_len - len(prompt_token_ids)
        super().__init__(
            request_id,
            num_prompt_tokens=len(prompt_token_ids),
            max_output_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            block_hashes=[],
        )
        self.token_ids: list[int] = []
        self.params = params
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {*eos_token_ids})
        self.seed = params.seed if params.seed is not None else _derived_seed(default_seed, request_id)
        self.slot = -1
        self.block_size = block_size
        self._hashes_blocks = hash_blocks
        self.arrival_s: float | None = None
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.append(prompt_token_ids)

    def append(self, token_ids: Many[int]) -> None:
        """Add tokens that are known now, and the hashes of the blocks that they fill.

        The hash of a block is the 16-byte BLAKE2b of the hash before it and its own tokens as int32, so that equal
        hashes mean equal tokens from the start of the prompt on. Whether a block is in the cache is not said here:
        the scheduler offers it once its KV is computed.
        """
        known = self.token_ids
        known.extend(token_ids)
        if not self._hashes_blocks:
            return
        hashes, size = self.block_hashes, self.block_size
        while (len(hashes) + 1) * size <= len(known):
            start = len(hashes) * size
            hashes.append(block_hash(hashes[-1] if hashes else b"", known[start : start + size]))

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """The output tokens that have reached the host."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length" or "abort"; None while it goes on."""
        return self.status.value if self.status.is_finished else None


def block_hash(parent: bytes, token_ids: Many[int]) -> bytes:
    """The hash of a full block behind the block with hash `parent`, which is empty for the first one."""
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


def check_prompt(token_ids: Many[int], max_model_len: int, vocab_size: int | None = None) -> None:
    """
    Raises:
        UserError: the prompt is empty, leaves no room for a token of output, or has an id outside the vocabulary.
    """
    if not len(token_ids):
        raise UserError("the prompt is empty; it needs at least 1 token")
    if len(token_ids) >= max_model_len:
        raise UserError(
            f"the prompt has {len(token_ids)} tokens; at most {max_model_len - 1} leave room for one token of output "
            f"within max_model_len {max_model_len}"
        )
    if vocab_size is not None and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise UserError(f"the prompt has token id {shown(wrong)}; the model's are 0 to {vocab_size - 1}")


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """
    Raises:
        UserError: logit_bias has an id that is no token of the model.
    """
    wrong = max(params.logit_bias or (), default=-1)
    if wrong >= vocab_size:
        raise UserError(f"logit_bias has token id {wrong}; the model's are 0 to {vocab_size - 1}")


def _derived_seed(default_seed: int, request_id: Hashable) -> int:
    """The same in every process, which hash() is not for strings."""
    digest = hashlib.blake2b(f"{default_seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
