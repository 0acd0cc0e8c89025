"""Golden requests: what an engine answered where it was built, to ask again wherever it is about to serve.

golden.json lies beside the engine, and its digest is in the manifest:

    {"format": 1, "labels": [...], "requests": [
      {"text": "...", "tokens": [12], "answer": "..."},                            classify, embed
      {"query": "...", "passages": ["...", "..."], "tokens": [9, 11], "answer": "..."},     rerank
      {"text": "...", "tokens": 12, "token_ids": [...], "logprobs": [...]}]}            generate

`tokens` counts what the tokenizer makes of the request, row by row. `answer` is base64 of little-endian
float32: probabilities in the order of `labels`, the embedding, or a score for each passage.

Another processor or kernel moves answers a little, and rounding to INT8 makes much of a little. One request
may be moved far by it, all together are not: so it is the mean distance that is limited. What moves that
further is another model: wrong weights, another tokenizer, broken quantization (measured: docs/pipeline.md).
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

# The largest mean distance, of engines that compute in floating point and of quantized ones.
LIMITS: Final[Mapping[str, tuple[float, float]]] = {
    "embed": (0.03, 0.12),
    "classify": (0.06, 0.25),
    "rerank": (0.06, 0.25),
    "generate": (0.03, 0.1),
}
UNITS: Final = {
    "embed": "of an embedding's length",
    "classify": "in log odds",
    "rerank": "in log odds",
    "generate": "nats of a token's log probability",
}
_FLOATING = ("fp16", "fp32")
# Beyond this a probability is as good as certain, and its log odds are made of rounding.
_CERTAIN = 1e-4

FloatArray = npt.NDArray[np.float32]


class ProbeFailed(EngineRefused):
    """An engine answers its golden requests otherwise than where it was built."""


class Differs(Exception):
    """What tells an answer from the recorded one."""


@dataclass(frozen=True, slots=True)
class Golden:
    """The recorded requests of one engine. `labels` are a classifier's, in the order of its outputs; `limit`
    is the largest mean distance between recorded and found answers."""

    task: str
    limit: float
    labels: tuple[str, ...]
    requests: tuple[Mapping[str, Any], ...]

    def where(self, index: int) -> str:
        """How a message names request `index`; never by its text."""
        return f"golden request {index + 1} of {len(self.requests)}"

    def judge(self, distances: Sequence[float]) -> None:
        """Raises Differs where the distances of all requests, in order, are too large on average."""
        mean = float(np.mean(distances))
        if mean <= self.limit:
            return
        raise Differs(
            f"on average {mean:.3f} {UNITS[self.task]} from the recorded answers (at most {self.limit:g}), "
            f"{self.where(int(np.argmax(distances)))} most, with {max(distances):.3f}"
        )


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
        limit = LIMITS[manifest["task"]][manifest["precision"] not in _FLOATING]
        return Golden(manifest["task"], limit, tuple(found["labels"]), tuple(found["requests"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProbeFailed(f"{path}: no golden requests of format {FORMAT} ({error!r:.200})") from None


def packed(values: npt.ArrayLike) -> str:
    """Numbers as text, all their bits."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)


def encoder_distance(task: str, recorded: FloatArray, found: npt.ArrayLike) -> float:
    """How far `found` is from the `recorded` answer: of its length, or the log odds that changed most.

    Raises Differs for another number of numbers, or for some that are not finite.
    """
    values = np.asarray(found, dtype=np.float32).reshape(-1)
    if values.shape != recorded.shape:
        raise Differs(f"{values.size} numbers instead of {recorded.size}")
    if not np.isfinite(values).all():
        raise Differs("numbers that are not finite")
    if task == "embed":
        return float(np.linalg.norm(values - recorded) / max(float(np.linalg.norm(recorded)), 1e-9))
    return float(np.abs(_log_odds(values) - _log_odds(recorded)).max())


def _log_odds(probabilities: FloatArray) -> npt.NDArray[np.float64]:
    held = np.clip(probabilities.astype(np.float64), _CERTAIN, 1 - _CERTAIN)
    odds: npt.NDArray[np.float64] = np.log(held / (1 - held))
    return odds


def generator_distance(
    recorded: Mapping[str, Any], token_ids: Sequence[int], logprobs: Sequence[float]
) -> float:
    """How far the log probabilities of a greedy generation are from the `recorded` one's, on average.

    Raises Differs for another token. Of a last one that was not well ahead of all others only the log
    probability is recorded: whichever comes first there, it has about that.
    """
    wanted, expected = recorded["token_ids"], np.asarray(recorded["logprobs"])
    found = list(token_ids[: len(wanted)])
    if found != wanted:
        place = next((n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
        raise Differs(f"{[*found, 'nothing'][place]} instead of token {wanted[place]}, at place {place + 1}")
    given = np.asarray(logprobs, dtype=np.float64)[: len(expected)]
    if given.shape != expected.shape or not np.isfinite(given).all():
        raise Differs(f"{given.size} log probabilities instead of {expected.size}, or some not finite")
    return float(np.abs(given - expected).mean())
