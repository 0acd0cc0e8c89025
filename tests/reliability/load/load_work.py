"""What is sent and what must come back: serialized requests, each with its expected answer or error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferResult, service_pb2

from client.codec import Array, InferRequest
from client.wire import infer_message

# What the composition of a batch may change of an FP32 answer; of one that is in order it is some 1e-6.
TOLERANCE = 1e-3
HIGH, USUAL = 1, 2
PRIORITY = "onecard_priority"


class Expected(Protocol):
    def fault(self, answer: Any) -> str:
        """What is wrong with an answer, "" if nothing."""


@dataclass(slots=True)
class Tensors:
    """An encoder's answer. Bytes that were once found right are right again without being decoded."""

    values: Mapping[str, Array]
    _right: set[int] = field(default_factory=set)

    def fault(self, answer: bytes) -> str:
        if (known := hash(answer)) in self._right:
            return ""
        result = InferResult(service_pb2.ModelInferResponse.FromString(answer))
        for name, wanted in self.values.items():
            found = result.as_numpy(name)
            if found is None or found.shape != wanted.shape:
                return f"{name} is {'missing' if found is None else found.shape}, not {wanted.shape}"
            if wanted.dtype.kind != "f":
                if found.tolist() != wanted.tolist():
                    return f"{name} differs"
            elif not (apart := float(np.abs(found - wanted).max())) <= TOLERANCE:
                return f"{name} is off by {apart:.2g}"
        self._right.add(known)
        return ""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A stream's tokens; not `whole`: those of a stream that was left, as far as it came."""

    ids: tuple[int, ...]
    whole: bool = True

    def fault(self, answer: Sequence[int]) -> str:
        found = tuple(answer)
        if self.whole and len(found) < len(self.ids):
            return f"{len(found)} tokens came of {len(self.ids)}"
        wanted = self.ids[: len(found)]
        if found == wanted:
            return ""
        place = next((i for i, token in enumerate(wanted) if token != found[i]), len(wanted))
        return f"token {place} of {len(self.ids)} is another"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The error of a request that cannot be answered: gRPC's code ("" on a stream) and the whole message."""

    code: str
    pattern: str

    def fault(self, answer: tuple[str, str]) -> str:
        code, message = answer
        right = code == self.code and re.fullmatch(self.pattern, message)
        return "" if right else f"refused with {code} {message[:120]!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One request. `work`: tokens that it makes the engine compute (of an LLM: generate). `leave_after`: so
    many responses of its stream are read, then the client goes away; 0: all."""

    model: str
    payload: bytes
    expected: Expected
    stream: bool = False
    work: int = 0
    priority: int = USUAL
    leave_after: int = 0


def payload(model: str, inputs: Mapping[str, Array]) -> bytes:
    """A serialized request, of either kind of call."""
    request = InferRequest(model=model, inputs=inputs, outputs=(), request_id="")
    made: bytes = infer_message(request).SerializeToString(deterministic=True)
    return made


def token_ids(response: Any) -> npt.NDArray[np.int32]:
    """Of one ModelInferResponse of the LLM, without decoding anything else."""
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "token_ids":
            return np.frombuffer(raw, np.int32)
    return np.empty(0, np.int32)
