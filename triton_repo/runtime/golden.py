"""Golden requests: what an engine answered where it was built, to ask again wherever it is about to serve.

golden.json lies beside the engine, and its digest is in the manifest:

    {"format": 1, "labels": [...], "requests": [
      {"text": "...", "tokens": [12], "answer": "..."},                            classify, embed
      {"query": "...", "passages": ["...", "..."], "tokens": [9, 11], "answer": "..."},     rerank
      {"text" or "messages": ..., "tokens": 12, "token_ids": [...], "logprobs": [...],      generate
       "runners_up": [[token, gap], ...]}]}

`tokens` counts what the tokenizer makes of the request, row by row. `answer` is base64 of little-endian
float32: probabilities in the order of `labels`, the embedding, or a score for each passage. `runners_up` are
the second best tokens and how many nats the best was ahead of each.

How far another processor, another kernel or other neighbours in a batch may move an answer was measured
(docs/pipeline.md). What moves it further is another model: wrong weights, another tokenizer, broken
quantization.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.session import EngineRefused

FILE: Final = "golden.json"
FORMAT: Final = 1

# Distance between two embeddings by the recorded one's length: a cosine of 0.995 where both have the same.
EMBEDDING_DISTANCE: Final = 0.1
# Of any probability, or of a reranker's score, both of which lie between 0 and 1.
PROBABILITY_DISTANCE: Final = 0.05
# Nats, of each generated token's log probability.
LOGPROB_DISTANCE: Final = 0.5

FloatArray = npt.NDArray[np.float32]


class ProbeFailed(EngineRefused):
    """An engine answers a golden request otherwise than where it was built."""


@dataclass(frozen=True, slots=True)
class Golden:
    """The recorded requests of one engine; `labels` are a classifier's, in the order of its outputs."""

    task: str
    labels: tuple[str, ...]
    requests: tuple[Mapping[str, Any], ...]

    def where(self, index: int) -> str:
        """How a message names request `index`; never by its text."""
        return f"golden request {index + 1} of {len(self.requests)}"


def read_golden(folder: Path, manifest: Mapping[str, Any]) -> Golden | None:
    """The golden requests of an engine folder whose digests were checked; None where none were recorded.

    Raises ProbeFailed for a file that is none of ours.
    """
    if FILE not in manifest["files"]:
        return None
    path = Path(folder) / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or not found["requests"]:
            raise ValueError(f"format {found['format']}, {len(found['requests'])} requests")
        return Golden(manifest["task"], tuple(found["labels"]), tuple(found["requests"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProbeFailed(f"{path}: no golden requests of format {FORMAT} ({error!r:.200})") from None


def packed(values: npt.ArrayLike) -> str:
    """Numbers as text, all their bits."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)


def encoder_difference(task: str, recorded: FloatArray, found: npt.ArrayLike) -> str | None:
    """What tells `found` from the `recorded` answer of the same engine; None where both may be its own."""
    values = np.asarray(found, dtype=np.float32).reshape(-1)
    if values.shape != recorded.shape:
        return f"{values.size} numbers instead of {recorded.size}"
    if not np.isfinite(values).all():
        return "numbers that are not finite"
    if task == "embed":
        distance = float(np.linalg.norm(values - recorded) / max(float(np.linalg.norm(recorded)), 1e-9))
        if distance <= EMBEDDING_DISTANCE:
            return None
        return f"an embedding {distance:.3f} of its length away (at most {EMBEDDING_DISTANCE:g})"
    distance = float(np.abs(values - recorded).max())
    if distance <= PROBABILITY_DISTANCE:
        return None
    what = "a probability" if task == "classify" else "a score"
    return f"{what} {distance:.3f} away (at most {PROBABILITY_DISTANCE:g})"


def generator_difference(
    recorded: Mapping[str, Any], token_ids: Sequence[int], logprobs: Sequence[float]
) -> str | None:
    """What tells a greedy generation from the `recorded` one of the same engine; None where nothing does.

    Where the two best tokens were nearly as likely, the other one may come first; what follows it is another
    text, and is not compared.
    """
    if len(token_ids) != len(logprobs):
        return f"{len(token_ids)} tokens with {len(logprobs)} log probabilities"
    wanted = recorded["token_ids"]
    pairs = zip(wanted, recorded["logprobs"], recorded["runners_up"], strict=True)
    for place, (token, logprob, (second, gap)) in enumerate(pairs):
        if place == len(token_ids):
            return f"{len(token_ids)} tokens instead of {len(wanted)}"
        found, where = token_ids[place], f"token {place + 1}"
        if found not in (token, second) or (found == second and gap > LOGPROB_DISTANCE):
            return f"{where} is {found} instead of {token}, which was {gap:.2f} nats ahead of {second}"
        distance = abs(logprobs[place] - logprob)
        if not distance <= LOGPROB_DISTANCE:
            return f"{where} is {distance:.2f} nats from its log probability (at most {LOGPROB_DISTANCE:g})"
        if found == second:
            return None
    return None
