"""The requests of a run with their expected answers: given by the runtime in process, one at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import load_served as served
import numpy as np
from load_work import HIGH, PRIORITY, Refusal, Shot, Tensors, Tokens, payload

from calibration.samples import load_groups, load_texts
from client import codec
from client.codec import Array
from client.generate import Prompt, parameters, request_inputs

_ENCODER_REQUESTS = 64
_STREAMS = 40
# About as many as the encoders read (256 tokens).
_MOST_WORDS = 180
_MOST_WORDS_OF_A_PROMPT = 60
_LEFT_AFTER = 4
# Beside how many whole streams there is one whose client goes away.
_LEFT_SHARE = 4

Pool = dict[str, list[Shot]]
Inputs = dict[str, Array]


def answered(model: str, rng: random.Random) -> list[Shot]:
    """Requests that must be answered, of the usual priority."""
    return _streams(rng) if model == served.LLM else _encoded(model, rng)


def urgent(shots: Sequence[Shot]) -> list[Shot]:
    """The same requests with priority 1, as a client asks for it: by a parameter of the request."""
    return [
        replace(shot, payload=_with_parameter(shot.payload, PRIORITY, HIGH), priority=HIGH) for shot in shots
    ]


def unreadable(shot: Shot) -> Shot:
    """The request with a priority that there is not: refused where a rejected one is rejected."""
    refusal = Refusal("" if shot.stream else "INVALID_ARGUMENT", r"'onecard_priority' is -1; .*")
    return replace(shot, payload=_with_parameter(shot.payload, PRIORITY, -1), expected=refusal)


def left(streams: Sequence[Shot]) -> list[Shot]:
    """Streams that their client leaves after some pieces."""
    return [
        replace(shot, leave_after=_LEFT_AFTER, expected=Tokens(shot.expected.ids, whole=False))
        for shot in streams[::_LEFT_SHARE]
        if isinstance(shot.expected, Tokens) and shot.work > 2 * _LEFT_AFTER
    ]


def refused() -> list[Shot]:
    """Requests that nobody can answer, with the error that each must get."""
    bad, none = "INVALID_ARGUMENT", ""
    vector, label, order = served.ENCODERS
    cases: list[tuple[str, Inputs, str, str]] = [
        (vector, {"text": codec.text_column([b""])}, bad, r"'text' is empty"),
        (vector, {"text": codec.text_column([b"good", b" \t "])}, bad, r"'text' 1 is blank"),
        (label, {"text": codec.text_column([b"bad \xff"])}, bad, r"'text' is not valid UTF-8 \(byte 0xff.*"),
        (order, _pair(b"which?", [b"this", b""]), bad, r"'passages' 1 is empty"),
        ("nobody", {"text": codec.text_column([b"a"])}, "NOT_FOUND", r"Request for unknown model: .*"),
        (served.LLM, _stream(b"a", max_tokens=0), none, r"'max_tokens' .*"),
        (served.LLM, _stream(b"a " * 2000, max_tokens=4), none, r"the prompt has .* tokens.*"),
        (served.LLM, _stream(b"\xff", max_tokens=4), none, r"'text' is not valid UTF-8 .*"),
    ]
    return [
        Shot(
            model=model,
            payload=payload(model, inputs),
            expected=Refusal(code, pattern),
            stream=model == served.LLM,
        )
        for model, inputs, code, pattern in cases
    ]


def _encoded(model: str, rng: random.Random) -> list[Shot]:
    from triton_repo.runtime.encode import Encoder
    from triton_repo.runtime.service import EncoderService

    encoder = Encoder.open(served.engine_folder(model))
    service = EncoderService(encoder)
    shots = []
    for inputs in _encoder_inputs(model, rng):
        before = encoder.tokens
        (answer,) = service.answer([inputs])
        assert isinstance(answer, dict), answer
        shots.append(
            Shot(
                model=model,
                payload=payload(model, inputs),
                expected=Tensors(answer),
                work=encoder.tokens - before,
            )
        )
    return shots


def _encoder_inputs(model: str, rng: random.Random) -> Iterator[Inputs]:
    """Texts of 3 to 180 words, short ones more often; one request in three has several."""
    if model == "order":
        groups = load_groups("bundled:ranking:evaluation", limit=_ENCODER_REQUESTS)
        for group in groups:
            passages = group.passages[: rng.choice((2, 3))]
            yield _pair(group.query.encode(), [text.encode() for text in passages])
        return
    words = [word for review in load_texts("bundled:reviews:evaluation") for word in review.text.split()]
    for _ in range(_ENCODER_REQUESTS):
        rows = rng.choice((1, 1, 3))
        yield {"text": codec.text_column([_text(words, rng, _MOST_WORDS).encode() for _ in range(rows)])}


def _text(words: Sequence[str], rng: random.Random, most: int) -> str:
    count = round(math.exp(rng.uniform(math.log(3), math.log(most))))
    start = rng.randrange(len(words) - count)
    return " ".join(words[start : start + count])


def _pair(query: bytes, passages: Sequence[bytes]) -> Inputs:
    return {"query": codec.text_row([query]), "passages": codec.text_row(passages)}


def _streams(rng: random.Random) -> list[Shot]:
    from triton_repo.runtime.generation import GenerationService

    service = GenerationService.open(served.engine_folder(served.LLM))
    words = [word for review in load_texts("bundled:reviews:evaluation") for word in review.text.split()]
    shots = []
    for _ in range(_STREAMS):
        text, tokens = _text(words, rng, _MOST_WORDS_OF_A_PROMPT), rng.randrange(8, 33)
        fields = {"text": text, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        (answer,) = service.generate(fields)
        sent = payload(served.LLM, _stream(text.encode(), max_tokens=tokens))
        shots.append(
            Shot(model=served.LLM, payload=sent, expected=Tokens(answer.token_ids), stream=True, work=tokens)
        )
    service.close()
    return shots


def _stream(text: bytes, *, max_tokens: int) -> Inputs:
    settings = parameters({"temperature": 0.0, "ignore_eos": True})
    settings["max_tokens"] = np.array([max_tokens], np.int32)  # unchecked: some are to be refused
    return request_inputs(Prompt("text", text), settings, stream=True)


def _with_parameter(sent: bytes, name: str, value: int) -> bytes:
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest.FromString(sent)
    message.parameters[name].int64_param = value
    made: bytes = message.SerializeToString(deterministic=True)
    return made
