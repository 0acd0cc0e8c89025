"""How the next token is chosen: the same processed distribution as Transformers', drawn by a seed of its own.

Order of Transformers' generate: repetition penalty, then (unless greedy) temperature, top-k, top-p, min-p.
Each sequence draws one number per token from its own generator, so that what runs beside it changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.texts import BadRequest, EngineFailed

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
_INT64 = 1 << 63
_STRIDE = 16
_FLOAT = np.finfo(np.float32)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request wants its tokens; the defaults are greedy.

    `max_tokens` is per sample; a slot that is full ends a sample earlier. `top_k` 0, `top_p` 1, `min_p` 0
    and `repetition_penalty` 1 are off. `seed` None draws from the operating system. `logprobs` asks for the
    natural logarithm of the probability that the model itself (temperature 1, no penalty, nothing cut) gave
    each token.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    logprobs: bool = False
    ignore_eos: bool = False

    def validate(self) -> None:
        """Raises BadRequest that names the first field that is out of its range, and its value."""
        _integer("max_tokens", self.max_tokens, 1)
        _integer("top_k", self.top_k, 0, hint=" (0 turns it off)")
        _integer("n", self.n, 1)
        _number("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or above")
        _number("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1 turns it off)")
        _number("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 (off) and 1")
        _number(
            "repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 is off)"
        )
        if self.seed is not None and not -_INT64 <= self.seed < _INT64:
            raise BadRequest(f"'seed' is {self.seed}, which is no 64-bit integer")
        self._validate_stops()

    def _validate_stops(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise BadRequest(f"'stop' has {len(self.stop)} strings; at most {MAX_STOPS} are looked for")
        for position, text in enumerate(self.stop):
            where = "'stop'" if len(self.stop) == 1 else f"'stop' {position}"
            if not text:
                raise BadRequest(f"{where} is empty; leave it out to stop at the model's own end of text")
            if len(text) > MAX_STOP_CHARACTERS:
                raise BadRequest(
                    f"{where} has {len(text)} characters; a stop string has at most {MAX_STOP_CHARACTERS}"
                )
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise BadRequest(f"'stop_token_ids' has {len(self.stop_token_ids)} ids; at most {MAX_STOP_IDS}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)


def _integer(name: str, value: int, least: int, *, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"'{name}' is {value!r}, not an integer")
    if value < least:
        raise BadRequest(f"'{name}' is {value}; it must be at least {least}{hint}")


def _number(name: str, value: float, fits: bool, wanted: str) -> None:
    if not math.isfinite(value) or not fits:
        raise BadRequest(f"'{name}' is {value:g}; it must be {wanted}")


class Sampler:
    """Chooses the tokens of one sequence; remembers which it has seen, for the repetition penalty.

    `sample` of n samples of one request: 0 to n - 1, each with a stream of random numbers of its own;
    sample 0 of any n is what n = 1 gives.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocabulary: int, *, sample: int = 0
    ) -> None:
        self._params = params
        self._greedy = params.temperature == 0
        self._temperature = np.float32(params.temperature)
        self._penalty = np.float32(min(max(params.repetition_penalty, float(_FLOAT.tiny)), float(_FLOAT.max)))
        self._seen: npt.NDArray[np.bool_] | None = None
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocabulary, dtype=np.bool_)
            tokens = np.asarray(prompt, dtype=np.int64)
            self._seen[tokens[tokens < vocabulary]] = True
        self._random: np.random.Generator | None = None
        if not self._greedy:
            entropy = None if params.seed is None else [params.seed % (1 << 64), sample]
            self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    def sample(self, logits: FloatArray) -> tuple[int, float | None]:
        """The next token for float32 logits [vocabulary], and its log probability when that was asked for.

        Raises EngineFailed for logits that are no numbers.
        """
        scores = self._penalized(logits)
        if self._random is None:
            token = int(scores.argmax())
            # argmax answers with the first NaN where there is one.
            if not math.isfinite(scores[token]):
                raise EngineFailed("the engine failed: its logits are no numbers")
        else:
            ids, scores = self._shortlist(scores)
            cumulated = np.cumsum(_weights(scores))
            place = int(np.searchsorted(cumulated, self._random.random() * cumulated[-1], side="right"))
            place = min(place, len(cumulated) - 1)
            token = place if ids is None else int(ids[place])
        if self._seen is not None:
            self._seen[token] = True
        return token, _log_probability(logits, token) if self._params.logprobs else None

    def process(self, logits: FloatArray) -> FloatArray:
        """The scores [vocabulary] that the next token is drawn from, -inf where it cannot be."""
        scores = self._penalized(logits)
        if self._greedy:
            return scores
        ids, kept = self._shortlist(scores)
        if ids is None:
            return kept
        answer = np.full(len(logits), -np.inf, dtype=np.float32)
        answer[ids] = kept
        return answer

    def _penalized(self, logits: FloatArray) -> FloatArray:
        if self._seen is None:
            return logits
        ids = np.flatnonzero(self._seen)
        values = logits[ids]
        with np.errstate(over="ignore"):
            changed = np.where(values < 0, values * self._penalty, values / self._penalty)
        # An extreme penalty leads to float32's end, not beyond: only the engine gives what is no number.
        scores = logits.copy()
        scores[ids] = np.where(np.isfinite(values), changed.clip(_FLOAT.min, _FLOAT.max), changed)
        return scores

    def _shortlist(self, scores: FloatArray) -> tuple[IntArray | None, FloatArray]:
        """Ids that can be drawn (None: all of them) and the score of each, divided by the temperature."""
        top = scores.max()
        if not math.isfinite(top):
            raise EngineFailed("the engine failed: its logits are no numbers")
        params = self._params
        ids: IntArray | None = None
        if 0 < params.top_k < len(scores):
            least = _kth_largest(scores, params.top_k)
            # A little more: what differs now may be equal after the division, and then it stays.
            ids = np.flatnonzero(scores >= least - abs(least) * np.float32(1e-6))
            warm = self._warm(scores[ids], top)
            least = np.partition(warm, len(warm) - params.top_k)[len(warm) - params.top_k]
            ids, warm = _narrowed(ids, warm, np.flatnonzero(warm >= least))
        else:
            warm = self._warm(scores, top)
        if params.top_p < 1:
            ids, warm = _narrowed(ids, warm, _nucleus(warm, params.top_p))
        if params.min_p > 0:
            weights = _weights(warm)
            ids, warm = _narrowed(ids, warm, np.flatnonzero(weights >= params.min_p))
        return ids, warm

    def _warm(self, scores: FloatArray, top: np.float32) -> FloatArray:
        """Scores divided by the temperature; `top` is the best one."""
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            warm = scores / self._temperature
            if math.isfinite(warm.max()) and self._temperature:
                return warm
            # So cold that float32 overflows (or rounds the temperature to 0): only differences count.
            cold = (scores - top).astype(np.float64) / self._params.temperature
            return np.maximum(cold, np.finfo(np.float32).min).astype(np.float32)


def _kth_largest(scores: FloatArray, k: int) -> np.float32:
    """The k-th largest of `scores`; of many, by way of those that are above what a sample of them says."""
    sample = scores[::_STRIDE]
    rank = 2 * k // _STRIDE + 8
    if rank < len(sample) // 2:
        bound = np.partition(sample, len(sample) - rank)[len(sample) - rank]
        high = scores[scores >= bound]
        if len(high) >= k:
            scores = high
    kth: np.float32 = np.partition(scores, len(scores) - k)[len(scores) - k]
    return kth


def _narrowed(ids: IntArray | None, scores: FloatArray, kept: IntArray) -> tuple[IntArray, FloatArray]:
    return (kept if ids is None else ids[kept]), scores[kept]


def _weights(scores: FloatArray) -> npt.NDArray[np.float64]:
    """Probabilities relative to the best one, which has 1."""
    weights: npt.NDArray[np.float64] = np.exp((scores - scores.max()).astype(np.float64))
    return weights


def _nucleus(scores: FloatArray, top_p: float) -> IntArray:
    """Places that top-p keeps: all but the least likely tokens that have at most 1 - p together."""
    weights = _weights(scores)
    probabilities = weights / weights.sum()
    spare = 1.0 - top_p
    # Tokens below this are never kept, whatever their number: together they have less than the spare mass.
    # What remains to be sorted is short wherever the model is sure of something.
    candidates = np.flatnonzero(probabilities >= spare / len(probabilities))
    order = candidates[np.argsort(probabilities[candidates], kind="stable")]
    cumulated = np.cumsum(probabilities[order])
    cumulated += 1.0 - cumulated[-1]
    kept = cumulated > spare
    kept[-1] = True
    return np.sort(order[kept])


def _log_probability(logits: FloatArray, token: int) -> float:
    top = logits.max()
    mass = float(np.exp((logits - top).astype(np.float64)).sum())
    return float(logits[token]) - float(top) - math.log(mass)
