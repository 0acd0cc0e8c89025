"""Requests as fields in, deltas of text out: engine, tokenizer, chat template and scheduler in one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from triton_repo.runtime.admission import Busy, Limits
from triton_repo.runtime.chat import ChatTemplate, checked_unicode, read_messages
from triton_repo.runtime.delivery import Delta
from triton_repo.runtime.detokenize import detokenizer_factory
from triton_repo.runtime.jobs import Handle, Request
from triton_repo.runtime.metrics import resident_bytes
from triton_repo.runtime.sampling import SamplingParams
from triton_repo.runtime.scheduler import Scheduler
from triton_repo.runtime.session import read_manifest
from triton_repo.runtime.text_stream import TextStream
from triton_repo.runtime.texts import BadRequest, decode_text
from triton_repo.runtime.tokenization import read_tokenizer, tokenizing

FIELDS = ("text", "messages", *(field.name for field in fields(SamplingParams)))
# A prompt with more characters than this per token of a slot is first tokenized that far only: nearly always
# that is enough to refuse it, without reading a megabyte.
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole sample. finish_reason is "stop" or "length"; usage is that of the request."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    usage: dict[str, float]


class Schedules(Protocol):
    """Runs requests on an engine; every method but `start` may be called from any thread."""

    def __init__(self, engine: Any, *, limits: Limits | None) -> None: ...

    def start(self) -> None: ...

    def check(self, level: int, timeout_s: float, arrived: float | None = None) -> None: ...

    def submit(self, request: Request) -> Handle: ...

    def refuse(self, error: Exception) -> None: ...

    def snapshot(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class GenerationService:
    """Generates for one model. Every method may be called from any thread."""

    def __init__(self, engine: Any, tokenizer: Any, scheduler: Schedules) -> None:
        self._manifest: Mapping[str, Any] = engine.manifest
        serving = self._manifest["serving"]
        chat = dict(serving.get("chat") or {})
        source = chat.pop("template", None)
        tokens = {name: token for name, token in chat.items() if isinstance(token, str)}
        self._template = ChatTemplate(source, tokens) if source else None
        self.slots: int = engine.slots
        self._capacity: int = engine.capacity
        self._bos: int | None = serving.get("bos_id")
        self._eos = frozenset(serving["eos_ids"])
        self._tokenizer = tokenizer
        self._open_detokenizer = detokenizer_factory(tokenizer)
        self._scheduler = scheduler

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        threads: int | None = None,
        device: int = 0,
        limits: Limits | None = None,
    ) -> GenerationService:
        """Open an engine folder (digests checked) and start its scheduler. `device`: which GPU, if any;
        `limits`: what may wait.

        Raises EngineRefused, TokenizerRefused or TemplateRefused.
        """
        engine: Any
        opened: type[Schedules]
        if read_manifest(Path(folder))["target"] == "tensorrt-llm":
            from triton_repo.runtime.tensorrt_llm import LlmEngine, LlmScheduler

            engine, opened = LlmEngine.open(Path(folder)), LlmScheduler
        else:
            from triton_repo.runtime.engines import open_decoder_engine

            engine, opened = open_decoder_engine(Path(folder), threads, device), Scheduler
        tokenizer = read_tokenizer(Path(folder) / "tokenizer.json")
        scheduler = opened(engine, limits=limits)
        service = cls(engine, tokenizer, scheduler)
        scheduler.start()
        return service

    def check(self, level: int, timeout_s: float, arrived: float) -> None:
        """Raises Busy for a request that would be rejected, before anything of it is read; counts nothing."""
        self._scheduler.check(level, timeout_s, arrived)

    def submit(
        self,
        request: Mapping[str, Any],
        on_delta: Callable[[Delta], object],
        *,
        level: int = 0,
        timeout_s: float = math.inf,
        arrived: float | None = None,
    ) -> Handle:
        """Start generating for a request of the fields in FIELDS, exactly one of text and messages among
        them; `level`, `timeout_s` and `arrived` (monotonic seconds; None: now) as in `jobs.Request`.

        `on_delta` gets every delta in order, on another thread; the last one has `usage`. It may be slow
        without holding up anybody else; if it raises, the request is cancelled. A field that is None is not
        given.

        Raises BadRequest for a request that cannot be answered, naming the field; Busy for one that is
        rejected.
        """
        try:
            # Before its prompt is tokenized: a crowd must not keep the processor busy with being rejected.
            since = time.monotonic() if arrived is None else arrived
            self._scheduler.check(level, timeout_s, since)
            read = self._read(request, on_delta)
            read = replace(read, level=level, timeout_s=timeout_s, arrived=since)
        except (BadRequest, Busy) as error:
            self.refuse(error)
            raise
        return self._scheduler.submit(read)

    def refuse(self, error: Exception) -> None:
        """Count a request that was refused before it became one of fields."""
        self._scheduler.refuse(error)

    def generate(self, request: Mapping[str, Any]) -> list[Answer]:
        """The finished samples of a request, in order. Raises what `submit` raises, and EngineFailed."""
        deltas: list[Delta] = []
        self.submit(request, deltas.append).wait()
        failed = next((delta.error for delta in deltas if delta.error), None)
        if failed:
            raise failed
        usage = deltas[-1].usage or {}
        return [
            _answer([delta for delta in deltas if delta.index == index], usage)
            for index in sorted({delta.index for delta in deltas})
        ]

    def prompt(self, request: Mapping[str, Any]) -> list[int]:
        """The token ids that a request's text or messages become. Raises BadRequest."""
        text, messages = request.get("text"), request.get("messages")
        if (text is None) == (messages is None):
            raise BadRequest(f"give {'either' if text is None else 'only one of'} 'text' or 'messages'")
        if messages is not None:
            if self._template is None:
                raise BadRequest("this model has no chat template; send 'text' instead of 'messages'")
            # The template has written the special tokens.
            return self._encode(self._template.render(read_messages(messages)), special=False)
        ids = self._encode(_text(text, "'text'"), special=True)
        # A text that begins with the token itself gets no second one.
        return ids[1:] if self._bos is not None and ids[:2] == [self._bos, self._bos] else ids

    def snapshot(self) -> dict[str, Any]:
        """See Scheduler.snapshot; and the memory of this process."""
        planned = sum(self._manifest.get("memory", {}).values())
        own = {"resident_bytes": resident_bytes()} | ({"planned_bytes": planned} if planned else {})
        return self._scheduler.snapshot() | own

    def close(self) -> None:
        """End what runs as "cancelled"; reject what waits."""
        self._scheduler.close()

    def _read(self, request: Mapping[str, Any], on_delta: Callable[[Delta], object]) -> Request:
        params = read_params(request)
        params.validate()
        stops = params.stop

        def open_text() -> TextStream:
            return TextStream(self._open_detokenizer(), stops)

        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        return Request(self.prompt(request), params, on_delta, stop_ids, open_text)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        bound = self._capacity * _CHARACTERS_PER_TOKEN
        if len(text) > bound:
            with tokenizing():
                count = len(self._tokenizer.encode(text[:bound], add_special_tokens=special).ids)
            if count > self._capacity + 1:
                raise BadRequest(
                    f"the prompt has more than {count - 1} tokens ({len(text)} characters); "
                    f"a slot of this model holds {self._capacity}"
                )
        with tokenizing():
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids


def read_params(request: Mapping[str, Any]) -> SamplingParams:
    """A request's sampling parameters, of the right types but any range. Raises BadRequest."""
    values: dict[str, Any] = {}
    for name, value in request.items():
        if name not in FIELDS:
            near = get_close_matches(str(name), FIELDS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(FIELDS)}"
            raise BadRequest(f"unknown field {str(name)!r:.60}{hint}")
        if value is not None and name in _READERS:
            values[name] = _READERS[name](value, f"'{name}'")
    return SamplingParams(**values)


def _answer(deltas: list[Delta], usage: dict[str, float]) -> Answer:
    return Answer(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(value for delta in deltas for value in delta.logprobs),
        finish_reason=deltas[-1].finish_reason,
        usage=usage,
    )


def _text(value: Any, where: str) -> str:
    if isinstance(value, bytes):
        text = decode_text(value, where)
    elif isinstance(value, str):
        text = decode_text(checked_unicode(value, where).encode(), where)
    else:
        raise BadRequest(f"{where} is a {type(value).__name__}, not a text")
    if not text:
        raise BadRequest(f"{where} is empty")
    return text


def _integer(value: Any, where: str) -> int:
    value = _item(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{where} is {value!r:.40}, not an integer")
    return value


def _number(value: Any, where: str) -> float:
    value = _item(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{where} is {value!r:.40}, not a number")
    return float(value)


def _truth(value: Any, where: str) -> bool:
    value = _item(value)
    if not isinstance(value, bool):
        raise BadRequest(f"{where} is {value!r:.40}, not true or false")
    return value


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, bytes | str):
        value = [value]
    return tuple(_text(entry, where) for entry in _sequence(value, where))


def _integers(value: Any, where: str) -> tuple[int, ...]:
    value = _item(value)
    if isinstance(value, int):
        value = [value]
    return tuple(_integer(entry, where) for entry in _sequence(value, where))


def _sequence(value: Any, where: str) -> list[Any]:
    if hasattr(value, "tolist"):  # a numpy array
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise BadRequest(f"{where} is {value!r:.40}, not a list")
    return list(value)


def _item(value: Any) -> Any:
    """A numpy scalar, or an array of one, as a number of Python's."""
    return value.item() if getattr(value, "size", None) == 1 else value


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "max_tokens": _integer,
    "temperature": _number,
    "top_k": _integer,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "seed": _integer,
    "stop": _strings,
    "stop_token_ids": _integers,
    "n": _integer,
    "logprobs": _truth,
    "ignore_eos": _truth,
}
