"""What each call does, written once: generators that yield the I/O they need and receive its result.

`Client` performs the effects by blocking, `AsyncClient` by awaiting; neither knows what a classification is.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeVar

from . import codec
from .codec import InferReply, InferRequest
from .errors import ClientError, InvalidInput, ModelNotReady, UnexpectedAnswer, UnknownModel
from .types import Classification, Embedding, ModelInfo, Ranked

T = TypeVar("T")
VERSION_ROUNDS = 4
_REQUEST_ID = re.compile(r"[!-~]{1,100}")


@dataclass(frozen=True, slots=True)
class Describe:
    """Effect: the ModelInfo of a model (from the client's cache where it can)."""

    model: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Effect: one of the server's own reports, as JSON."""

    question: Literal["statistics", "metadata"]


@dataclass(frozen=True, slots=True)
class InferAll:
    """Effect: every request's reply, in the order of the requests, some of them in flight together."""

    requests: tuple[InferRequest, ...]


@dataclass(frozen=True, slots=True)
class ReadMetrics:
    """Effect: the Scrape of the metrics at an address."""

    address: str


Effect = Describe | Ask | InferAll | ReadMetrics
Flow = Generator[Effect, Any, T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which model variant answers, and how its queue treats the request."""

    model: str | None = None
    precision: str | None = None
    priority: int = 0
    request_id: str | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("model", self.model),
            ("precision", self.precision),
            ("request_id", self.request_id),
        ):
            if value is not None and not (isinstance(value, str) and value):
                raise InvalidInput(f"{name} must be a non-empty str, not {value!r}")
        # It goes into headers and logs.
        if self.request_id is not None and not _REQUEST_ID.fullmatch(self.request_id):
            raise InvalidInput("request_id must be at most 100 visible ASCII characters")
        if not isinstance(self.priority, int) or isinstance(self.priority, bool) or self.priority < 0:
            raise InvalidInput(
                f"priority must be 0 (the model's default) or a level from 1 up, not {self.priority!r}"
            )


class CallOptions(TypedDict, total=False):
    """Keyword arguments that every call of both clients takes.

    `model` may be left out when the server has one for the task; `precision` picks its variant; `priority` is
    1 for the most urgent, 0 for the model's default; `timeout` is in seconds for the whole call.
    """

    model: str | None
    precision: str | None
    priority: int
    request_id: str | None
    timeout: float | None


def split_options(given: CallOptions) -> tuple[Options, float | None]:
    known = CallOptions.__annotations__
    for name in given:
        if name not in known:
            raise TypeError(f"unknown option {name}; known: {', '.join(known)}")
    chosen = {name: value for name, value in given.items() if name != "timeout"}
    return Options(**chosen), given.get("timeout")  # type: ignore[arg-type]


def classify(texts: Iterable[str], options: Options) -> Flow[list[Classification]]:
    return (yield from _per_text("classify", texts, options, codec.parse_classifications))


def embed(texts: Iterable[str], options: Options) -> Flow[list[Embedding]]:
    return (yield from _per_text("embed", texts, options, codec.parse_embeddings))


def _per_text(
    task: str, texts: Iterable[str], options: Options, parse: Callable[[InferReply, int], list[T]]
) -> Flow[list[T]]:
    encoded = codec.encode_texts(texts, "text")
    if not encoded:
        return []
    info = yield from resolve(task, options)
    slices = codec.split(len(encoded), info.max_batch)
    inputs = [{"text": codec.text_column(encoded[part])} for part in slices]
    requests = _requests(task, info, options, inputs, slices)
    replies = yield from one_version(requests, lambda some: _infer(task, info, some))
    return [
        answer
        for part, reply in zip(slices, replies, strict=True)
        for answer in parse(reply, part.stop - part.start)
    ]


def rerank(query: str, passages: Iterable[str], options: Options) -> Flow[list[Ranked]]:
    # A passage's score depends on the query and itself alone, so a long list may be scored in parts.
    question = codec.text_row([codec.encode_text(query, "query")])
    given = passages if isinstance(passages, str | bytes | Mapping) else list(passages)
    encoded = codec.encode_texts(given, "passage")
    if not encoded:
        raise InvalidInput("no passages to rank")
    info = yield from resolve("rerank", options)
    slices = codec.split(len(encoded), info.max_batch)
    inputs = [{"query": question, "passages": codec.text_row(encoded[part])} for part in slices]
    requests = _requests("rerank", info, options, inputs, slices)
    replies = yield from one_version(requests, lambda some: _infer("rerank", info, some))
    scores: list[float] = []
    truncated: list[bool] = []
    for part, reply in zip(slices, replies, strict=True):
        some_scores, some_truncated = codec.parse_scores(reply, part.stop - part.start)
        scores += some_scores
        truncated += some_truncated
    return codec.rank([str(passage) for passage in given], scores, truncated)


def _infer(task: str, info: ModelInfo, requests: tuple[InferRequest, ...]) -> Flow[list[InferReply]]:
    """Replies in order; a failure that the response cache replays without its reason is asked for again.

    Triton 2.51's cache keeps failed responses too, and answers the next equal request with a success that
    has no outputs. Blanks after the last text make the request another one to the cache, and to the model the
    same.
    """
    replies: list[InferReply] = yield InferAll(requests)
    empty = [place for place, reply in enumerate(replies) if not reply.outputs]
    if not (empty and info.cached):
        return replies
    last = codec.SIGNATURES[task].inputs[-1]
    again = []
    for place in empty:
        inputs = dict(requests[place].inputs)
        inputs[last] = codec.with_blanks(inputs[last], uuid.uuid4().int % 2**32)
        again.append(replace(requests[place], inputs=inputs))
    fresh = yield InferAll(tuple(again))
    for place, reply in zip(empty, fresh, strict=True):
        replies[place] = reply
    return replies


def one_version(
    requests: tuple[InferRequest, ...],
    infer: Callable[[tuple[InferRequest, ...]], Flow[list[InferReply]]],
) -> Flow[list[InferReply]]:
    """Replies in order, all from one version of the model; `infer` asks for some.

    A rollout may come between the parts of a call: those of the older version are asked for again. Where the
    server answers with another version than was wanted, as in a rollback, that one counts from then on.
    """
    replies = yield from infer(requests)
    wanted = ""
    for _ in range(VERSION_ROUNDS):
        versions = {reply.version for reply in replies}
        if len(versions) <= 1:
            return replies
        wanted = wanted if wanted in versions else max(versions, key=_version_order)
        late = [place for place, reply in enumerate(replies) if reply.version != wanted]
        fresh = yield from infer(tuple(requests[place] for place in late))
        for place, reply in zip(late, fresh, strict=True):
            replies[place] = reply
        answered = {reply.version for reply in fresh}
        wanted = max(answered, key=_version_order)
    if len({reply.version for reply in replies}) > 1:
        raise UnexpectedAnswer(
            "the model was replaced again and again while this call was answered",
            model=requests[0].model,
            next_step="call again",
        )
    return replies


def _version_order(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else 0, version)


def _requests(
    task: str,
    info: ModelInfo,
    options: Options,
    inputs: Sequence[Mapping[str, codec.Array]],
    slices: Sequence[slice],
) -> tuple[InferRequest, ...]:
    base = options.request_id or new_id()
    return tuple(
        InferRequest(
            model=info.name,
            inputs=tensors,
            outputs=codec.SIGNATURES[task].outputs,
            request_id=base if len(inputs) == 1 else f"{base}/{place}",
            task=task,
            texts=part.stop - part.start,
            priority=options.priority,
            part="" if len(inputs) == 1 else f"items {part.start} to {part.stop - 1}",
        )
        for place, (tensors, part) in enumerate(zip(inputs, slices, strict=True))
    )


def new_id() -> str:
    """For a call that was given none: 12 hexadecimal digits."""
    return uuid.uuid4().hex[:12]


def resolve(task: str, options: Options) -> Flow[ModelInfo]:
    """The variant that answers: `<model>` is the first precision, `<model>-<precision>` every other."""
    if options.model is None:
        plain = yield from _only_model(task)
    else:
        plain = yield Describe(options.model)
    info: ModelInfo = plain
    if options.precision is not None and plain.precision != options.precision:
        variant = f"{plain.name}-{options.precision}"
        try:
            info = yield Describe(variant)
        except UnknownModel as error:
            raise UnknownModel(
                f"no {options.precision} variant: the server has no model {variant}",
                model=plain.name,
                next_step="`client status` lists the models and their precisions",
            ) from error
    _check_signature(task, info)
    return info


def _check_signature(task: str, info: ModelInfo) -> None:
    wanted = codec.SIGNATURES[task]
    if info.task not in (None, task):
        raise InvalidInput(f"this model's task is {info.task}, not {task}", model=info.name)
    missing = [name for name in wanted.inputs if name not in info.inputs]
    missing += [name for name in wanted.outputs if name not in info.outputs]
    if missing or (info.max_batch < 1 and task != "generate"):
        lacks = f"it lacks {', '.join(missing)}" if missing else "it takes no batches"
        raise InvalidInput(f"this model cannot {task}: {lacks}", model=info.name)


def _only_model(task: str) -> Flow[ModelInfo]:
    """The one model of a task, when the caller names none; its other precisions do not count as models."""
    infos = yield from _ready_models()
    names = {info.name for info in infos}
    found = [
        info
        for info in infos
        if info.task == task and info.name.removesuffix(f"-{info.precision}") not in names - {info.name}
    ]
    if len(found) != 1:
        known = ", ".join(sorted(info.name for info in found))
        what = f"several models {task}: {known}" if found else f"no model on this server can {task}"
        raise UnknownModel(what, next_step="name the model" if found else "`client status` lists the models")
    return found[0]


def _ready_models() -> Flow[list[ModelInfo]]:
    # Not from the repository's index, which only an administrator may ask for.
    report = yield Ask("statistics")
    infos = []
    for name in sorted({entry["name"] for entry in report.get("model_stats", ())}):
        with suppress(UnknownModel, ModelNotReady):  # unloaded since
            infos.append((yield Describe(name)))
    return infos


def describe(model: str) -> Flow[ModelInfo]:
    Options(model=model)  # checks the name
    info: ModelInfo = yield Describe(model)
    return info


def check_timeout(timeout: float) -> float:
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < 1e7:
        raise InvalidInput(f"timeout must be a positive number of seconds, not {timeout!r}")
    return float(timeout)


def located(error: ClientError, request: InferRequest) -> ClientError:
    """The error with model, request and part of the list filled in where its origin did not know them."""
    if request.part and isinstance(error, InvalidInput):
        counted = "" if request.decoupled else "counted within "
        error.message = f"{error.message} [{counted}{request.part} of the list]"
    error.model = error.model or request.model
    error.request_id = error.request_id or request.request_id
    return error


def single(flow: Flow[list[T]]) -> Flow[T]:
    """The only answer of a call that was given one text."""
    answers = yield from flow
    return answers[0]
