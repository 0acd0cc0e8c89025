"""A stand-in for TensorRT-LLM 1.2: the names, arguments and manners that its documentation gives the LLM API.

It has no model: an answer is the prompt again, token by token, then the end token, over and over. Arguments
that are not documented are TypeErrors. It enforces what the library does: a result belongs to a running event
loop, no sequence outgrows `max_seq_len`, `max_batch_size` sequences run at once, others wait inside.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tensorrt_llm.llmapi import KvCacheConfig

__version__ = "1.2.1"
# A prompt with this token breaks the engine two tokens later.
BREAKS = 0
_TOKEN_S = float(os.environ.get("FAKE_TOKEN_S", "0.001"))


class RequestError(RuntimeError):
    """As tensorrt_llm.executor.utils.RequestError."""


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: Any = None
    bad_token_ids: list[int] | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None
    logprobs: int | None = None
    exclude_input_from_output: bool = True
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RequestOutput:
    """An answer on its way: `async for` gives itself again whenever it has grown."""

    def __init__(self, llm: LLM, prompt: list[int], params: SamplingParams) -> None:
        self.prompt_token_ids = prompt
        self.sampling_params = params
        self.outputs = [CompletionOutput(0)]
        self.finished = False
        self.cached_tokens = 0
        self.script = prompt[random.randrange(len(prompt)) :] if params.temperature else prompt
        self.aborted = False
        self._llm = llm
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[tuple[list[int], str | None] | Exception] = asyncio.Queue()

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        step = await self._steps.get()
        if isinstance(step, Exception):
            self.finished = True
            raise step
        tokens, reason = step
        output = self.outputs[0]
        output.token_ids.extend(tokens)
        output.finish_reason, self.finished = reason, reason is not None
        return self

    def abort(self) -> None:
        assert not self.finished, "aborting what has ended"
        self.aborted = True
        self._llm.aborted += 1

    def put(self, step: tuple[list[int], str | None] | Exception) -> None:
        self._loop.call_soon_threadsafe(self._steps.put_nowait, step)


class LLM:
    opened: ClassVar[list[LLM]] = []
    # Whether the end token itself is among an answer's tokens: the documentation does not say.
    shows_end = True

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        model: str,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        *,
        max_batch_size: int = 2048,
        max_input_len: int = 1024,
        max_seq_len: int | None = None,
        max_beam_width: int = 1,
        max_num_tokens: int = 8192,
        kv_cache_config: KvCacheConfig | None = None,
        enable_chunked_prefill: bool = False,
        load_format: str = "auto",
        stream_interval: int = 1,
    ) -> None:
        config = json.loads((Path(model) / "config.json").read_text())
        if not list(Path(model).glob("*.safetensors")):
            raise ValueError(f"Failed to load: no safetensors in {model}")
        assert skip_tokenizer_init, "this stand-in has no tokenizer"
        assert max_seq_len is not None
        assert max_input_len <= max_seq_len <= config["max_position_embeddings"]
        assert kv_cache_config is not None
        assert max_num_tokens >= max_batch_size
        self.arguments = {
            "model": model,
            "max_batch_size": max_batch_size,
            "max_input_len": max_input_len,
            "max_seq_len": max_seq_len,
            "max_num_tokens": max_num_tokens,
            "enable_chunked_prefill": enable_chunked_prefill,
            "kv_cache_config": kv_cache_config,
        }
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.most_running = self.aborted = 0
        self.params: list[SamplingParams] = []
        self._waiting: deque[RequestOutput] = deque()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        LLM.opened.append(self)

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
    ) -> RequestOutput:
        assert isinstance(inputs, list)
        assert all(type(token) is int for token in inputs)
        assert streaming
        assert sampling_params is not None
        if sampling_params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if sampling_params.stop is not None:
            raise ValueError("stop strings need a tokenizer")
        if len(inputs) + sampling_params.max_tokens > self.max_seq_len:
            raise ValueError(
                f"prompt length plus max_tokens should not exceed max_seq_len ({self.max_seq_len})"
            )
        self.params.append(sampling_params)
        result = RequestOutput(self, inputs, sampling_params)
        self._waiting.append(result)
        return result

    def shutdown(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        running: list[tuple[RequestOutput, int]] = []
        while not self._stopped.wait(_TOKEN_S):
            while self._waiting and len(running) < self.max_batch_size:
                running.append((self._waiting.popleft(), 0))
            self.most_running = max(self.most_running, len(running))
            running = [(result, made + 1) for result, made in running if self._step(result, made)]

    def _step(self, result: RequestOutput, made: int) -> bool:
        """One token more; whether the answer goes on."""
        params = result.sampling_params
        if result.aborted:
            result.put(([], "cancelled"))
            return False
        if BREAKS in result.prompt_token_ids and made == 2:
            result.put(RequestError("CUDA error: an illegal memory access was encountered"))
            return False
        place = made % (len(result.script) + 1)
        assert params.end_id is not None
        token = result.script[place] if place < len(result.script) else params.end_id
        if token == params.end_id and not params.ignore_eos:
            result.put(([token] if self.shows_end else [], "stop"))
            return False
        if token in (params.stop_token_ids or []):
            result.put(([token] if params.include_stop_str_in_output else [], "stop"))
            return False
        last = made + 1 == params.max_tokens
        result.put(([token], "length" if last else None))
        return not last


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
