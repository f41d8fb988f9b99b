"""One loop without phases: every request's computed tokens catch up with its tokens and drafts under one budget.

The engine and the simulator drive it in the same way::

    step = scheduler.schedule()                 # which requests, how many tokens each
    ... run the step, or predict its time ...
    finished = scheduler.update(step, ...)      # what was sampled

Running requests come first, in order of admission, then waiting ones. When pages run out, the newest running request
is preempted: it loses its pages and goes back to the head of the queue, to be recomputed. Nothing is admitted in a
step that preempted. A waiting request is admitted only if all its known tokens would fit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.scheduling.kv_cache import KVCacheConfig, KVCacheManager
from engine.scheduling.request import Request, RequestStatus
from engine.scheduling.step import Step

# Where `advance` packs a step and the index of a running request into one integer.
_STEP_SHIFT = 20
_INDEX_MASK = (1 << _STEP_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The limits of one step.

    Attributes:
        max_num_batched_tokens: query tokens per step.
        max_num_seqs: running requests.
        max_model_len: prompt and output tokens of one request.
        enable_chunked_prefill: let a prompt be computed over several steps.
        num_lookahead_tokens: slots reserved beyond the scheduled tokens, for a draft model that writes KV ahead.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    max_model_len: int = 131072
    enable_chunked_prefill: bool = True
    num_lookahead_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_seqs > _INDEX_MASK:
            raise ValueError(f"max_num_seqs must be at most {_INDEX_MASK}, not {self.max_num_seqs}")
        if self.num_lookahead_tokens < 0:
            raise ValueError(f"num_lookahead_tokens must not be negative, not {self.num_lookahead_tokens}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs ({self.max_num_seqs}) must not exceed max_num_batched_tokens "
                f"({self.max_num_batched_tokens}): every running request needs a token of each step's budget"
            )

    @property
    def max_step_tokens(self) -> int:
        """Slots that one request can claim in a step: a sliding window has to hold them on top of itself."""
        return self.max_num_batched_tokens + self.num_lookahead_tokens


class Scheduler:
    """Owns the waiting and running requests and their pages.

    Attributes:
        waiting: queue, first come first served; a preempted request stands at its head.
        running: admitted requests, oldest first.
        num_steps: steps scheduled so far.
        num_preemptions: preemptions so far.
        num_used_before_release: blocks that were held when requests last finished, just before theirs went back.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCacheConfig) -> None:
        """
        Raises:
            ValueError: if the cache cannot hold one request of max_model_len tokens, which could then never finish.
        """
        self.config = config
        self.kv = KVCacheManager(cache)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_used_before_release = 0
        self._enable_prefix_caching = cache.enable_prefix_caching
        self._in_flight: deque[Step] = deque()
        # True from a page shortage while steps are in flight until all of them have been updated.
        self._drains = False
        # True while the head of the queue is known not to fit; cleared by whatever could change that.
        self._head_is_blocked = False
        needed = cache.max_pages(config.max_model_len, config.max_step_tokens)
        if needed > self.kv.pool.num_free:
            raise ValueError(
                f"one request of max_model_len {config.max_model_len} tokens needs {needed} KV blocks of "
                f"{cache.block_size} tokens, but the pool has {self.kv.pool.num_free}"
            )

    # ---- the queue -------------------------------------------------------------------------------------------------

    @property
    def num_outstanding(self) -> int:
        """Requests waiting or running."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Its output limit is cut so that prompt and output stay within max_model_len.

        Raises:
            ValueError: if the prompt leaves no room for a token, or cannot be computed within one step's budget while
                chunked prefill is off.
        """
        room = self.config.max_model_len - request.num_prompt_tokens
        if room < 1:
            raise ValueError(
                f"request {request.request_id!r}: a prompt of {request.num_prompt_tokens} tokens leaves no room for "
                f"output within max_model_len {self.config.max_model_len}"
            )
        if not self.config.enable_chunked_prefill and request.num_prompt_tokens > self.config.max_num_batched_tokens:
            raise ValueError(
                f"request {request.request_id!r}: a prompt of {request.num_prompt_tokens} tokens exceeds "
                f"max_num_batched_tokens {self.config.max_num_batched_tokens} and chunked prefill is off"
            )
        if request.max_output_tokens > room:
            request.max_output_tokens = room
        self.waiting.append(request)

    def abort(self, request: Request) -> bool:
        """End a request at any time. Its pages are released once no step in flight reads them.

        Returns:
            False if it had already finished.
        """
        if request.status.is_finished:
            return False
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
            self._head_is_blocked = False
        request.status = RequestStatus.ABORTED
        self._detach_and_release(request)
        return True

    def set_drafts(self, request: Request, count: int) -> int:
        """Give a running request `count` draft tokens to verify in its next step.

        More drafts than the request may still use are dropped: a verification samples one token more than it accepts.
        While its prompt is not computed, or a verification is in flight, there is no last token to draft from and all
        are dropped.

        Returns:
            The drafts that were kept.
        """
        sampled = request.num_output_tokens + request.num_pending_tokens
        useful = request.max_output_tokens - sampled - 1
        uncomputed = request.num_tokens + request.num_pending_tokens - request.num_computed_tokens
        if request.num_computed_tokens < request.num_prefill_tokens or uncomputed < 1:
            useful = 0
        request.num_draft_tokens = kept = max(0, min(count, useful))
        return kept

    # ---- one step --------------------------------------------------------------------------------------------------

    def schedule(self, admit: bool = True) -> Step:
        """Choose the tokens of the next step and reserve their pages.

        It may be called again before the previous step is updated: a token that a step in flight is sampling can
        already be scheduled, its value never passes through here. Drafts in flight cannot: how many of them count is
        not known before their update.

        Args:
            admit: False to leave the waiting queue alone.

        Returns:
            The step; empty if nothing can run before a step in flight is updated, or at all. A non-empty step must be
            passed to `update`, in order.
        """
        step = Step(self.num_steps)
        if self._drains:
            if self._in_flight:
                return step
            self._drains = False
        budget = self._schedule_running(step, self.config.max_num_batched_tokens)
        if admit and self.waiting and not step.preempted and not self._drains:
            self._schedule_waiting(step, budget)
        if not step.is_empty:
            self.num_steps += 1
            self._in_flight.append(step)
        return step

    def _schedule_running(self, step: Step, budget: int) -> int:
        lookahead = self.config.num_lookahead_tokens
        running = self.running
        index = 0
        while index < len(running) and budget:
            request = running[index]
            index += 1
            computed = request.num_computed_tokens
            count = request.num_tokens + request.num_pending_tokens + request.num_draft_tokens - computed
            if count > budget:
                count = budget
            if count <= 0:
                continue
            pending = request.num_pending_tokens
            if pending and request.num_output_tokens + pending >= request.max_output_tokens:
                continue
            if computed + count + lookahead > request.num_slots and not self._make_room(
                request, min(computed + count + lookahead, self.config.max_model_len), step
            ):
                break
            budget -= count
            self._place(step, request, count)
        return budget

    def _make_room(self, request: Request, num_tokens: int, step: Step) -> bool:
        """Allocate pages for a running request, preempting the newest ones until they suffice."""
        while not self.kv.allocate(request, num_tokens):
            if self._in_flight:
                # Pages that steps in flight still read may be all that is missing: settle them before preempting.
                self._drains = True
                return False
            victim = self.running.pop()
            self._preempt(victim, step)
            if victim is request:
                return False
        if self.kv.has_sliding_groups:
            self._head_is_blocked = False
        return True

    def _preempt(self, request: Request, step: Step) -> None:
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        request.num_draft_tokens = 0
        self.num_preemptions += 1
        step.preempted.append(request)
        self._release(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)

    def _schedule_waiting(self, step: Step, budget: int) -> None:
        config, kv = self.config, self.kv
        while self.waiting and budget and len(self.running) < config.max_num_seqs and not self._head_is_blocked:
            request = self.waiting[0]
            cached, tables = 0, kv.no_pages
            if self._enable_prefix_caching and request.block_hashes:
                cached, tables = kv.find_prefix(request)
            count = request.num_tokens - cached
            if count > budget:
                if not config.enable_chunked_prefill and budget < config.max_num_batched_tokens:
                    break
                count = budget
            if not kv.can_hold_whole(request, tables, config.max_step_tokens):
                self._head_is_blocked = True
                break
            kv.adopt_prefix(request, cached, tables)
            slots = min(cached + count + config.num_lookahead_tokens, config.max_model_len)
            if not kv.allocate(request, slots):
                # The lookahead slots are not part of the prompt that was checked above.
                kv.free(request)
                request.num_computed_tokens = 0
                self._head_is_blocked = True
                break
            self.waiting.popleft()
            self._admit(step, request, cached)
            budget -= count
            self._place(step, request, count)

    def _admit(self, step: Step, request: Request, num_cached_tokens: int) -> None:
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = num_cached_tokens
        request.status = RequestStatus.RUNNING
        request.num_prefill_tokens = request.num_tokens
        self.running.append(request)
        step.admitted.append(request)

    def _place(self, step: Step, request: Request, count: int) -> None:
        """Enter `count` tokens of a request into the step and advance it."""
        shape = step.shape
        context = request.num_computed_tokens
        request.num_computed_tokens = computed = context + count
        request.num_in_flight_tokens += count
        if request.num_draft_tokens:
            request.num_draft_tokens = 0  # in the step now, or beyond its budget and stale
        if context < request.num_prefill_tokens:
            shape.prefills.append((count, context))
            step.prefill_requests.append(request)
            if computed < request.num_prefill_tokens:
                return  # a chunk that ends inside the prompt samples nothing
            shape.num_sampled += 1
        elif count == 1:
            shape.decode_contexts.append(context)
            step.decode_requests.append(request)
            shape.num_sampled += 1
        else:
            shape.verifies.append((count, context))
            step.verify_requests.append(request)
            shape.num_sampled += count
        request.num_pending_tokens += 1

    # ---- its result ------------------------------------------------------------------------------------------------

    def update(self, step: Step, num_sampled: Sequence[int] = (), stopped: Collection[Request] = ()) -> list[Request]:
        """Record what a step sampled: one token per decode and per finished prefill, and the given verify results.

        Args:
            step: the oldest step that is in flight.
            num_sampled: for each of `step.verify_requests`, the tokens it gained: accepted drafts plus the one token
                sampled after them, so 1 to query_tokens. The KV of the rest is dropped by lowering
                `num_computed_tokens`; the slots are overwritten by the next step.
            stopped: requests that sampled a stop token in this step.

        Returns:
            The requests that finished, in the step's order. Their pages go back once no step in flight reads them.

        Raises:
            ValueError: for a step out of order, or verify results that do not fit it.
        """
        if not self._in_flight or self._in_flight[0] is not step:
            raise ValueError("steps must be updated in the order in which they were scheduled")
        if step.verify_requests or num_sampled:
            self._check_verified(step, num_sampled)
        self._in_flight.popleft()
        finished: list[Request] = []
        for request, (count, context) in zip(step.prefill_requests, step.shape.prefills, strict=True):
            ends_prompt = context + count >= request.num_prefill_tokens
            self._settle(step, request, count, int(ends_prompt), 0, stopped, finished)
        if step.detached or stopped:
            for request in step.decode_requests:
                self._settle(step, request, 1, 1, 0, stopped, finished)
        else:
            self._settle_decodes(step.decode_requests, finished)
        if num_sampled:
            verified = zip(step.verify_requests, step.shape.verifies, num_sampled, strict=True)
            for request, (count, _), sampled in verified:
                self._settle(step, request, count, sampled, count - sampled, stopped, finished)
        if finished:
            self._retire(finished)
        return finished

    @staticmethod
    def _check_verified(step: Step, num_sampled: Sequence[int]) -> None:
        if len(num_sampled) != len(step.verify_requests):
            raise ValueError(f"{len(num_sampled)} verify results for {len(step.verify_requests)} verify requests")
        for (query, _), sampled in zip(step.shape.verifies, num_sampled, strict=True):
            if not 1 <= sampled <= query:
                raise ValueError(f"a verification of {query} tokens cannot yield {sampled}")

    def _settle_decodes(self, requests: list[Request], finished: list[Request]) -> None:
        """What `_settle` does, for what nearly every entry of nearly every step is."""
        hashing = self._enable_prefix_caching
        for request in requests:
            request.num_in_flight_tokens -= 1
            request.num_pending_tokens -= 1
            request.num_tokens += 1
            request.num_output_tokens = output = request.num_output_tokens + 1
            if hashing and request.num_hashed_blocks < len(request.block_hashes):
                self._commit(request)
            if output >= request.max_output_tokens:
                request.status = RequestStatus.FINISHED_LENGTH
                finished.append(request)

    def _settle(
        self,
        step: Step,
        request: Request,
        count: int,
        sampled: int,
        rejected: int,
        stopped: Collection[Request],
        finished: list[Request],
    ) -> None:
        """Account for one request's `count` computed tokens, the `sampled` it gained and the drafts `rejected`."""
        request.num_in_flight_tokens -= count
        if sampled:
            request.num_pending_tokens -= 1
        if request in step.detached:
            if not request.num_in_flight_tokens:
                self._release(request)
            return
        request.num_computed_tokens -= rejected
        if self._enable_prefix_caching:
            self._commit(request)
        if not sampled:
            return
        request.num_tokens += sampled
        request.num_output_tokens += sampled
        if request in stopped:
            request.status = RequestStatus.FINISHED_STOPPED
        elif request.num_output_tokens >= request.max_output_tokens:
            request.status = RequestStatus.FINISHED_LENGTH
        else:
            return
        finished.append(request)

    def _commit(self, request: Request) -> None:
        if self.kv.commit(request, request.num_computed_tokens - request.num_in_flight_tokens):
            self._head_is_blocked = False

    def _retire(self, finished: list[Request]) -> None:
        """Take finished requests off the running list and release their pages."""
        self.num_used_before_release = self.kv.pool.num_used
        self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]
        for request in finished:
            self._detach_and_release(request)

    def _detach_and_release(self, request: Request) -> None:
        """Release a request's pages, now or, if a step in flight uses them, when that step is updated."""
        if request.num_in_flight_tokens:
            for step in self._in_flight:
                if request in step.requests():
                    step.detached.add(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        if request.block_tables:
            self.kv.free(request)
            self._head_is_blocked = False

    # ---- many steps at once ----------------------------------------------------------------------------------------

    def steady_steps(self) -> int:
        """How many of the next steps decode exactly the requests that are running now, one token each.

        Within them nothing is admitted or preempted, and nothing finishes before the last. `advance` may be called
        with any number up to this one. 0 means that the next step must be scheduled singly.

        One step may be in flight if it decodes exactly these requests too. The tokens that it samples count as
        sampled: a request of which it samples the last token is in no further step, so there are no steady ones.
        """
        running, in_flight = self.running, len(self._in_flight)
        if not running or in_flight > 1 or self._drains or self.config.num_lookahead_tokens:
            return 0
        if in_flight:
            step = self._in_flight[0]
            if step.decode_requests != running or step.prefill_requests or step.verify_requests:
                return 0
        steps = self.config.max_model_len
        for request in running:
            if request.num_computed_tokens < request.num_prefill_tokens or request.num_draft_tokens:
                return 0
            left = request.max_output_tokens - request.num_output_tokens - in_flight
            if left < steps:
                steps = left
        if self.waiting:
            steps = min(steps, self._steps_while_head_is_blocked())
        return self._steps_within_free_blocks(steps)

    def _steps_while_head_is_blocked(self) -> int:
        """Steps for which the head of the queue certainly stays where it is."""
        if len(self.running) >= self.config.max_num_seqs:
            return self.config.max_model_len
        if not self._head_is_blocked:
            return 0
        if self._enable_prefix_caching and any(
            request.num_hashed_blocks < len(request.block_hashes) for request in self.running
        ):
            return 0  # a newly hashed block may be just what the head is waiting for
        if self.kv.has_sliding_groups:
            # A page boundary may return more pages than it takes.
            return min(request.num_slots - request.num_computed_tokens for request in self.running)
        return self.config.max_model_len

    def _steps_within_free_blocks(self, steps: int) -> int:
        """The most steps, up to `steps`, whose new pages fit the free blocks even if no window returns any."""
        block_size = self.kv.block_size
        free_pages = self.kv.pool.num_free // len(self.kv.windows)
        if len(self.running) * (-(-steps // block_size)) <= free_pages:
            return steps
        slack = [request.num_slots - request.num_computed_tokens for request in self.running]

        def pages(count: int) -> int:
            return sum(-(-(count - free) // block_size) for free in slack if count > free)

        if pages(steps) <= free_pages:
            return steps
        low, high = 0, steps  # pages(low) fits, pages(high) does not
        while high - low > 1:
            middle = (low + high) // 2
            if pages(middle) <= free_pages:
                low = middle
            else:
                high = middle
        return low

    def advance(self, steps: int) -> list[Request]:
        """Do `steps` plain decode steps at once: the result is that of as many `schedule` and `update` calls.

        With a step in flight, each of them is scheduled before the one ahead of it is updated::

            schedule n + 1, update n, schedule n + 2, update n + 1, ...        `steps` of both

        and the last one is left in flight. It takes the place of step n, whose object is moved on to become it.

        Args:
            steps: 1 to `steady_steps()`.

        Returns:
            The requests that finished, all of them in the last of the steps; none with a step in flight.
        """
        self._cross_page_boundaries(steps)
        self.num_steps += steps
        finished: list[Request] = []
        for request in self.running:
            request.num_computed_tokens += steps
            request.num_tokens += steps
            request.num_output_tokens = output = request.num_output_tokens + steps
            if output >= request.max_output_tokens:
                assert output == request.max_output_tokens, f"advance({steps}) goes beyond steady_steps()"
                request.status = RequestStatus.FINISHED_LENGTH
                finished.append(request)
        for step in self._in_flight:
            step.step_id += steps
            step.shape.decode_contexts = [context + steps for context in step.shape.decode_contexts]
        if finished:
            self._retire(finished)
        return finished

    def _cross_page_boundaries(self, steps: int) -> None:
        """Take (and commit) pages in the order in which single steps would: by step, then by running order."""
        block_size, running = self.kv.block_size, self.running
        # Events as single integers, step × 2^20 + index: a range lists those of one request, and they sort fast.
        end, stride = steps << _STEP_SHIFT, block_size << _STEP_SHIFT
        new_pages: list[int] = []
        for index, request in enumerate(running):
            new_pages += range((request.num_slots - request.num_computed_tokens << _STEP_SHIFT) + index, end, stride)
        commits: list[int] = []
        if self._enable_prefix_caching:
            for index, request in enumerate(running):
                if request.num_hashed_blocks < len(request.block_hashes):
                    settled = request.num_computed_tokens - request.num_in_flight_tokens
                    if settled // block_size > request.num_hashed_blocks:
                        commits.append((1 << _STEP_SHIFT) + index)  # hashes that came after their blocks were full
                    fill = block_size - settled % block_size
                    commits += range((fill << _STEP_SHIFT) + index, end + (1 << _STEP_SHIFT), stride)
        if commits or (new_pages and self.kv.has_sliding_groups):
            self._cross_one_by_one(new_pages, commits)
        elif new_pages:
            new_pages.sort()
            self.kv.add_pages([running[event & _INDEX_MASK] for event in new_pages])

    def _cross_one_by_one(self, new_pages: list[int], commits: list[int]) -> None:
        """The same where the order of taking, releasing and committing matters."""
        # A block fills at the end of one step, before anything is allocated for the next, or with a step in flight for
        # the one after that.
        events = sorted(
            [(event >> _STEP_SHIFT, 0, event & _INDEX_MASK) for event in commits]
            + [(event >> _STEP_SHIFT, 1, event & _INDEX_MASK) for event in new_pages]
        )
        bases = [request.num_computed_tokens for request in self.running]
        for step, allocates, index in events:
            request = self.running[index]
            request.num_computed_tokens = bases[index] + step
            if allocates:
                room = self.kv.allocate(request, request.num_computed_tokens + 1)
                assert room, "steady_steps promised free blocks"
            else:
                self.kv.commit(request, request.num_computed_tokens - request.num_in_flight_tokens)
        for request, base in zip(self.running, bases, strict=True):
            request.num_computed_tokens = base
        self._head_is_blocked = False

    # ---- checks ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants: every block is in one state, no budget or limit is exceeded.

        Raises:
            AssertionError: saying which does not hold.
        """
        live = list(self.running)
        seen = set(map(id, live))
        for step in self._in_flight:
            for request in step.detached:
                if id(request) not in seen:
                    seen.add(id(request))
                    live.append(request)
        self.kv.pool.check([table for request in live for table in request.block_tables])
        assert len(self.running) <= self.config.max_num_seqs, "more running requests than max_num_seqs"
        for request in self.running:
            assert request.status is RequestStatus.RUNNING, f"{request} is on the running list"
            assert request.num_computed_tokens <= request.num_slots, f"{request} has tokens without a page"
        for request in self.waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), f"{request} is waiting"

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that requests hold, 0 to 1."""
        return self.kv.pool.num_used / (self.kv.pool.num_blocks - 1)
