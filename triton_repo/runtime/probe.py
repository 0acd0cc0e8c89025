"""Asked before a model counts as ready: does its engine answer as it did where it was built?

Inside the served process, on the engine that is about to serve: until this has passed, Triton sends it no
request, and leaves the version before it. Eight requests of an encoder, 32 tokens of an LLM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.golden import (
    Differs,
    Golden,
    ProbeFailed,
    encoder_distance,
    generator_distance,
    read_golden,
    unpacked,
)
from triton_repo.runtime.session import read_manifest
from triton_repo.runtime.texts import BadRequest, EngineFailed

if TYPE_CHECKING:
    from triton_repo.runtime.encode import Encoder
    from triton_repo.runtime.generation import GenerationService
    from triton_repo.runtime.tokenization import Row, TextTokenizer

# Of an engine without golden requests (not run where it was built) it is only known what no answer may be.
_TEXT = "ok"


def encoder_rows(
    tokenizer: TextTokenizer, task: str, requests: Sequence[Mapping[str, Any]]
) -> list[list[Row]]:
    """The engine's rows for each golden request: one for a text, one for each passage."""
    if task == "rerank":
        return tokenizer.pairs([(request["query"], request["passages"]) for request in requests])
    return [[row] for row in tokenizer.singles([request["text"] for request in requests])]


def probe_encoder(encoder: Encoder, folder: Path) -> None:
    """Ask an opened encoder the golden requests of its folder; without any, one text must give numbers.

    Raises ProbeFailed that names the request and the difference, not the text.
    """
    golden = read_golden(folder, encoder.engine.manifest)
    plain = {"text": _TEXT, "query": _TEXT, "passages": [_TEXT]}
    requests: Sequence[Mapping[str, Any]] = golden.requests if golden else [plain]
    rows = encoder_rows(encoder.tokenizer, encoder.task, requests)
    values = iter(encoder.encode([row for group in rows for row in group]))
    # Nobody sent these.
    encoder.runs = encoder.rows = encoder.tokens = encoder.padding = 0
    distances = []
    for index, (request, group) in enumerate(zip(requests, rows, strict=True)):
        with _failing(folder, golden, index):
            found = _numbers([next(values) for _ in group])
            if golden:
                check_tokens(request, [len(row.ids) for row in group])
                distances.append(encoder_distance(encoder.task, unpacked(request["answer"]), found))
            elif not np.isfinite(found).all():
                raise Differs("numbers that are not finite")
    if golden:
        with _failing(folder, golden):
            golden.judge(distances)


def _numbers(values: Sequence[Any]) -> npt.NDArray[np.float32]:
    for value in values:
        if isinstance(value, EngineFailed):
            raise Differs(str(value))
    return np.array(values, dtype=np.float32)


def probe_generator(service: GenerationService, folder: Path) -> None:
    """Ask an opened LLM the golden requests of its folder; without any, four tokens must come.

    Raises ProbeFailed that names the request and the difference, not the text.
    """
    golden = read_golden(folder, read_manifest(folder))
    requests: Sequence[Mapping[str, Any]] = golden.requests if golden else ()
    distances = []
    for index, recorded in enumerate(requests):
        with _failing(folder, golden, index):
            answer = service.generate(generator_request(recorded))[0]
            check_tokens(recorded, int(answer.usage["prompt_tokens"]))
            distances.append(generator_distance(recorded, answer.token_ids, answer.logprobs))
    with _failing(folder, golden):
        if golden:
            golden.judge(distances)
        else:
            service.generate({"text": _TEXT, "max_tokens": 4})


def generator_request(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a golden request as an LLM is asked: greedily, for as many tokens as were recorded."""
    return {"text": recorded["text"], "max_tokens": len(recorded["logprobs"]), "logprobs": True}


def check_tokens(recorded: Mapping[str, Any], found: Any) -> None:
    """Raises Differs where the tokenizer makes another number of tokens of a golden request."""
    if found != recorded["tokens"]:
        raise Differs(f"{found} tokens instead of {recorded['tokens']}: another tokenizer")


@contextlib.contextmanager
def _failing(folder: Path, golden: Golden | None, index: int | None = None) -> Iterator[None]:
    """Whatever is wrong inside, as ProbeFailed of the golden request `index`, or of all of them."""
    try:
        yield
    except (Differs, BadRequest, EngineFailed) as error:
        if golden is None:
            raise ProbeFailed(f"{folder}: the engine does not answer a short text: {error}") from None
        where = "its golden requests" if index is None else golden.where(index)
        raise ProbeFailed(f"{folder}: {where}: {error}") from None
