"""Offline inference, in the shape of vLLM's `LLM`.

llm = LLM("path/of/a/model", max_model_len=4096)
for output in llm.generate(["Hello", "The memory wall is"], SamplingParams(temperature=0, max_tokens=64)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.errors import UserError
from engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs, metrics_of
from engine.prompts import Prompt, PromptError, prompt_list, read_prompt
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.text import OutputText
from engine.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from engine.core import EngineCore, SequenceUpdate


class LLM:
    """One model on one device. Calls may be interleaved (`stream`), but come from one thread.

    Attributes:
        config: what it was told.
        core: the engine below.
        tokenizer: see `engine.tokenizer`.
    """

    def __init__(self, model: str, **options: object) -> None:
        """Load a model.

        Args:
            model: a Hugging Face folder; with load_format="dummy" also a config.json or the name of a built-in model.
            options: the other fields of `EngineConfig`.

        Raises:
            UserError: an option that there is not or that is out of its range, or a model that cannot be loaded or
                does not fit.
        """
        self._attach(_core(EngineConfig.from_options(model, options)))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """The same from a configuration."""
        return cls.from_core(_core(config))

    @classmethod
    def from_core(cls, core: EngineCore, tokenizer: Tokenizer | None = None) -> LLM:
        """The same around an engine that exists, by default with the tokenizer of its model."""
        llm = cls.__new__(cls)
        llm._attach(core, tokenizer)
        return llm

    def _attach(self, core: EngineCore, tokenizer: Tokenizer | None = None) -> None:
        self.core, self.config = core, core.config
        self.tokenizer = tokenizer or load_tokenizer(core.config.model, core.model_config.vocab_size)
        self._num_requests = 0
        self._live: dict[str, _Live] = {}
        self._continuations: dict[Sequence, _Continuation] = {}  # those that go on

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue all prompts, batched as memory allows.

        Args:
            prompts: one prompt or a list. A list, array or tensor of integers is one prompt of token ids.
            sampling_params: for all prompts, or one for each; None for the defaults.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One output per prompt, in their order.

        Raises:
            UserError: a prompt that is empty, too long or no prompt. It names the prompt's index, and none has run:
                a call that is refused changes nothing, the text of later calls included.
        """
        call = self._prepare(prompts, sampling_params, only_finished=True)
        with progress_bar(len(call.lives), use_tqdm) as update:
            outputs: dict[str, RequestOutput] = {}
            for output in self._outputs(call):
                outputs[output.request_id] = output
                update(output)
        return [outputs[live.request_id] for live in call.lives]

    def stream(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        only_finished: bool = False,
    ) -> Iterator[RequestOutput]:
        """Continue all prompts and yield an output whenever a request has new tokens.

        Request ids count the prompts from "0" on, over all calls.

        Every output holds all of the request's text and tokens so far, of all of its continuations; the last one is
        `finished`. The requests are queued when the first output is asked for. Closing the generator, or an
        interruption, aborts what is unfinished.

        Args:
            prompts, sampling_params: as for `generate`.
            only_finished: yield each request once, when it has finished.

        Raises:
            UserError: as `generate`, right away.
        """
        return self._outputs(self._prepare(prompts, sampling_params, only_finished))

    def abort(self, request_id: str) -> bool:
        """End a request; its stream then yields what there is, with finish_reason "abort".

        Returns:
            False if there is no such request, or it had already finished.
        """
        live = self._live.get(request_id)
        if live is None:
            return False
        for each in live.continuations:
            if each.finish_reason is None:
                self.core.abort(each.sequence)
                self._take(each, [], "abort", None)
        self._report(live)
        return True

    # ---- requests in -----------------------------------------------------------------------------------------------

    def _prepare(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: SamplingParams | Many[SamplingParams] | None,
        only_finished: bool,
    ) -> _Call:
        """Check every prompt; none is queued yet."""
        prompts = prompt_list(prompts)
        call = _Call([], deque(), only_finished)
        for index, (prompt, params) in enumerate(zip(prompts, _params_for(len(prompts), sampling_params), strict=True)):
            with _naming(index):
                call.lives.append(self._live_request(str(self._num_requests + index), call, prompt, params))
        self._num_requests += len(prompts)  # seeds come from it, so that what is refused must not count
        return call

    def _live_request(self, request_id: str, call: _Call, prompt: object, params: SamplingParams) -> _Live:
        text, token_ids = read_prompt(prompt)
        if text is not None:
            token_ids = self.tokenizer.encode(text)
        budget = self.config.max_num_batched_tokens
        if not self.config.enable_chunked_prefill and len(token_ids) > budget:
            raise UserError(
                f"the prompt has {len(token_ids)} tokens, more than max_num_batched_tokens {budget}, and chunked "
                "prefill is off"
            )
        live = _Live(request_id, call, text, token_ids)
        for index in range(params.n):
            of_this = params.continuation(index)
            sequence = Sequence(
                request_id if params.n == 1 else f"{index}_{request_id}",
                token_ids,
                of_this,
                max_model_len=self.core.max_model_len,
                eos_token_ids=self.core.model_config.eos_token_ids,
                block_size=self.config.block_size,
                hash_blocks=self.config.enable_prefix_caching,
                default_seed=self.config.seed,
                vocab_size=self.core.model_config.vocab_size,
            )
            output = OutputText(self.tokenizer, token_ids, of_this)
            live.continuations.append(_Continuation(index, sequence, live, output))
        return live

    def _queue(self, call: _Call) -> None:
        for index, live in enumerate(call.lives):
            self._live[live.request_id] = live
            for each in live.continuations:
                each.sequence.arrival_s = time.perf_counter()
                with _naming(index):
                    self.core.add(each.sequence)
                self._continuations[each.sequence] = each

    # ---- tokens out ------------------------------------------------------------------------------------------------

    def _outputs(self, call: _Call) -> Iterator[RequestOutput]:
        """What a call's requests give, stepping the engine for as long as one of them is unfinished."""
        able = True
        try:
            self._queue(call)
            while True:
                while call.ready:
                    yield call.ready.popleft()
                if call.num_finished == len(call.lives):
                    return
                self._step()
        except Exception:
            able = False  # to take another step
            raise
        finally:
            self._abandon(call)
            if able:
                self._drain()

    def _step(self) -> None:
        """One step of the engine, for whichever calls its requests belong to."""
        if not self.core.has_work:
            raise RuntimeError(f"the engine is idle, but {len(self._live)} requests have not finished")
        changed: dict[_Live, None] = {}  # an ordered set
        with _uninterrupted():
            for update in self.core.step():
                each = self._continuations.get(update.sequence)
                if each is not None:
                    self._take(each, update.new_token_ids, update.finish_reason, update)
                    changed[each.live] = None
            for live in changed:
                self._report(live)

    def _take(
        self, each: _Continuation, token_ids: list[int], reason: str | None, update: SequenceUpdate | None
    ) -> None:
        """New tokens of a continuation, or its end."""
        each.unread += token_ids
        if each.logprobs is not None and update is not None:
            each.logprobs += update.logprobs
        if reason is not None or not each.live.call.only_finished or each.sequence.params.stop:
            each.text.append(each.unread, reason)
            each.unread = []
        if each.text.finished:
            if reason is None:
                self.core.abort(each.sequence)
            reason = "stop"
        each.finish_reason = reason
        if reason is not None:
            del self._continuations[each.sequence]

    def _report(self, live: _Live) -> None:
        """Hand a request's output to its reader, if it waits for it as it is now."""
        if live.finished:
            del self._live[live.request_id]
            live.call.num_finished += 1
        if live.finished or not live.call.only_finished:
            live.call.ready.append(live.output())

    def _abandon(self, call: _Call) -> None:
        """Abort what is left of a call."""
        for live in call.lives:
            self._live.pop(live.request_id, None)
            for each in live.continuations:
                if self._continuations.pop(each.sequence, None) is not None:
                    self.core.abort(each.sequence)

    def _drain(self) -> None:
        """Let steps in flight end if no call waits for them: until then they hold the pages of what has finished."""
        with _uninterrupted():
            while not self._live and self.core.has_work:
                self.core.step()


@dataclass(eq=False)
class _Call:
    """Prompts that came together.

    Attributes:
        ready: outputs that its reader has not taken yet.
    """

    lives: list[_Live]
    ready: deque[RequestOutput]
    only_finished: bool
    num_finished: int = 0


@dataclass(eq=False)
class _Live:
    """A request in the engine."""

    request_id: str
    call: _Call
    prompt: str | None
    prompt_token_ids: list[int]
    continuations: list[_Continuation] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(each.finish_reason is not None for each in self.continuations)

    def output(self) -> RequestOutput:
        sequences = [each.sequence for each in self.continuations]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[each.output() for each in self.continuations],
            finished=self.finished,
            num_cached_tokens=sequences[0].num_cached_tokens,
            metrics=metrics_of(*sequences),
        )


@dataclass(eq=False)
class _Continuation:
    """One of a request's texts: a sequence of the engine's, with what its tokens have given so far.

    Attributes:
        text: of its tokens but the unread ones: nobody looks at the text before the end, so that it is made once.
        logprobs: of its tokens, if they were asked for.
    """

    index: int
    sequence: Sequence
    live: _Live
    text: OutputText
    unread: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None

    def __post_init__(self) -> None:
        if self.sequence.params.logprobs is not None:
            self.logprobs = []

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            self.index,
            self.text.text,
            list(self.text.token_ids),
            self.finish_reason,
            self.text.stop_reason,
            None if self.logprobs is None else list(self.logprobs),
        )


def _core(config: EngineConfig) -> EngineCore:
    from engine.core import EngineCore  # brings torch

    return EngineCore(config)


def _params_for(count: int, given: SamplingParams | Many[SamplingParams] | None) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise UserError(
            f"sampling_params is {type(given).__name__}; it must be SamplingParams, or a list with one for each prompt"
        )
    given = list(given)
    if len(given) != count:
        raise UserError(f"there are {len(given)} sampling_params for {count} prompts; give one for all or one for each")
    for index, each in enumerate(given):
        if not isinstance(each, SamplingParams):
            raise PromptError(index, f"its sampling_params is {type(each).__name__}; it must be SamplingParams")
    return given


@contextlib.contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say which prompt an error is about."""
    try:
        yield
    except UserError as error:
        raise PromptError(index, str(error)) from None


@contextlib.contextmanager
def progress_bar(count: int, shown: bool = True) -> Iterator[Callable[[RequestOutput], None]]:
    """A progress bar of finished requests on stderr; gives a function to be called with each of them."""
    if not shown:
        yield lambda output: None
        return
    from transformers.utils.logging import tqdm

    with tqdm(total=count, desc="Processed prompts", dynamic_ncols=True) as bar:
        started, num_tokens = time.perf_counter(), 0

        def update(output: RequestOutput) -> None:
            nonlocal num_tokens
            num_tokens += sum(len(each.token_ids) for each in output.outputs)
            bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - started):,.0f} output tokens/s", refresh=False)
            bar.update()

        yield update


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a step, between whose parts the engine's books do not balance."""
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt
