"""Asked before a model counts as ready: does its engine answer as it did where it was built?

Inside the served process, on the engine that is about to serve: until this has passed, Triton sends it no
request, and leaves the version before it. Eight short requests of an encoder, two of an LLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triton_repo.runtime.golden import (
    Golden,
    ProbeFailed,
    encoder_difference,
    generator_difference,
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
    encoder.tokens = encoder.padding = 0
    for index, (request, group) in enumerate(zip(requests, rows, strict=True)):
        found = [next(values) for _ in group]
        problem = next((str(value) for value in found if isinstance(value, EngineFailed)), None)
        if problem is None and golden:
            problem = _tokens_differ(request["tokens"], [len(row.ids) for row in group])
            problem = problem or encoder_difference(
                encoder.task, unpacked(request["answer"]), np.array(found)
            )
        elif problem is None and not np.isfinite(np.array(found)).all():
            problem = "numbers that are not finite"
        if problem:
            raise _failed(folder, golden, index, problem)


def probe_generator(service: GenerationService, folder: Path) -> None:
    """Ask an opened LLM the golden requests of its folder; without any, four tokens must come.

    Raises ProbeFailed that names the request and the difference, not the text.
    """
    golden = read_golden(folder, read_manifest(folder))
    if golden is None:
        _generated(service, folder, None, 0, {"text": _TEXT, "max_tokens": 4})
        return
    for index, recorded in enumerate(golden.requests):
        asked = generator_request(recorded)
        answer = _generated(service, folder, golden, index, asked)
        problem = _tokens_differ(recorded["tokens"], int(answer.usage["prompt_tokens"]))
        problem = problem or generator_difference(recorded, answer.token_ids, answer.logprobs)
        if problem:
            raise _failed(folder, golden, index, problem)


def generator_request(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a golden request as an LLM is asked: greedily, for as many tokens as were recorded."""
    prompt = {name: recorded[name] for name in ("text", "messages") if name in recorded}
    return {**prompt, "max_tokens": len(recorded["token_ids"]), "logprobs": True}


def _generated(
    service: GenerationService, folder: Path, golden: Golden | None, index: int, asked: Mapping[str, Any]
) -> Any:
    try:
        return service.generate(asked)[0]
    except (BadRequest, EngineFailed) as error:
        raise _failed(folder, golden, index, str(error)) from None


def _tokens_differ(recorded: Any, found: Any) -> str | None:
    return None if found == recorded else f"{found} tokens instead of {recorded}: another tokenizer"


def _failed(folder: Path, golden: Golden | None, index: int, problem: str) -> ProbeFailed:
    if golden is None:
        return ProbeFailed(f"{folder}: the engine does not answer a short text: {problem}")
    return ProbeFailed(
        f"{folder}: {golden.where(index)}: {problem}; this is not what the engine was built to answer"
    )
