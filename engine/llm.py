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
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.errors import UserError
from engine.outputs import CompletionOutput, RequestOutput, metrics_of
from engine.prompts import Prompt, PromptError, prompt_list, read_prompt
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.tokenizer import Detokenizer, Tokenizer, load_tokenizer

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

        Every output holds all of the request's text and tokens so far; the last one is `finished`. The requests are
        queued when the first output is asked for. Closing the generator, or an interruption, aborts what is unfinished.

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
        self.core.abort(live.sequence)
        self._finish(live, "abort")
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
        sequence = Sequence(
            request_id,
            token_ids,
            params,
            max_model_len=self.core.max_model_len,
            eos_token_ids=self.core.model_config.eos_token_ids,
            block_size=self.config.block_size,
            hash_blocks=self.config.enable_prefix_caching,
            default_seed=self.config.seed,
            vocab_size=self.core.model_config.vocab_size,
        )
        detokenizer = Detokenizer(self.tokenizer, token_ids) if params.detokenize else None
        return _Live(sequence, call, text, token_ids, detokenizer)

    def _queue(self, call: _Call) -> None:
        for index, live in enumerate(call.lives):
            live.sequence.arrival_s = time.perf_counter()
            with _naming(index):
                self.core.add(live.sequence)
            self._live[live.request_id] = live

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
        with _uninterrupted():
            for update in self.core.step():
                live = self._live.get(update.sequence.request_id)
                if live is not None and live.sequence is update.sequence:
                    self._take(live, update)

    def _take(self, live: _Live, update: SequenceUpdate) -> None:
        if update.finish_reason is not None:
            self._finish(live, update.finish_reason)
        elif not live.call.only_finished:
            live.read(None)
            live.call.ready.append(live.output(None))

    def _finish(self, live: _Live, reason: str) -> None:
        del self._live[live.request_id]
        live.read(reason)
        live.call.num_finished += 1
        live.call.ready.append(live.output(reason))

    def _abandon(self, call: _Call) -> None:
        """Abort what is left of a call."""
        for live in call.lives:
            if self._live.pop(live.request_id, None) is not None:
                self.core.abort(live.sequence)

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
    """A request in the engine, with the text that its tokens have given so far."""

    sequence: Sequence
    call: _Call
    prompt: str | None
    prompt_token_ids: list[int]
    detokenizer: Detokenizer | None
    text: str = ""
    num_read: int = 0

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    def read(self, finish_reason: str | None) -> None:
        """Turn tokens into text as far as they have come."""
        if self.detokenizer is None:
            return
        sequence = self.sequence
        stop = len(sequence.token_ids) - (finish_reason == "stop")
        new = sequence.token_ids[sequence.num_prompt_tokens + self.num_read : stop]
        self.num_read += len(new)
        if new:
            self.text += self.detokenizer.append(new)
        if finish_reason is not None:
            self.text += self.detokenizer.flush()

    def output(self, finish_reason: str | None) -> RequestOutput:
        sequence = self.sequence
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[CompletionOutput(0, self.text, sequence.output_token_ids, finish_reason)],
            finished=finish_reason is not None,
            num_cached_tokens=sequence.num_cached_tokens,
            metrics=metrics_of(sequence),
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
            num_tokens += len(output.outputs[0].token_ids)
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
