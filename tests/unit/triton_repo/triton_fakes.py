"""Triton's Python-backend module as far as a model file uses it; a generation service without an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from triton_repo.runtime.admission import full
from triton_repo.runtime.delivery import Delta
from triton_repo.runtime.texts import BadRequest

FINAL = 1
USAGE = {"prompt_tokens": 1, "completion_tokens": 1}


class Sender:
    """A response sender that keeps what is sent. `cancelled` and `broken` are for tests to set."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, int]] = []
        self.cancelled = self.broken = False
        self.polls = 0
        self.closed = threading.Event()

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.closed.is_set(), "nothing may follow the last response"
        if self.broken and response is not None:
            raise RuntimeError("no room in shared memory")
        self.sent.append((response, flags))
        if flags == FINAL:
            self.closed.set()

    def is_cancelled(self) -> bool:
        assert not self.closed.is_set(), "a closed sender's request is gone"
        self.polls += 1
        return self.cancelled

    @property
    def error(self) -> Any:
        assert self.closed.wait(5)
        return self.sent[-1][0]["error"]


class Request:
    """Id and parameters may be bytes, which are read as Triton does: not at all where they are no UTF-8."""

    def __init__(
        self, parameters: str | bytes = "{}", timeout_us: int = 0, id: bytes = b"r-1", **tensors: Any
    ) -> None:
        self.sender = Sender()
        self._parameters, self._timeout_us = parameters, timeout_us
        self._id, self._tensors = id, tensors

    def get_response_sender(self) -> Sender:
        return self.sender

    def inputs(self) -> list[Any]:
        return [_Tensor(name, value) for name, value in self._tensors.items()]

    def parameters(self) -> str:
        given = self._parameters
        return given.decode() if isinstance(given, bytes) else given

    def timeout(self) -> int:
        return self._timeout_us

    def request_id(self) -> str:
        return self._id.decode()


class _Tensor:
    def __init__(self, name: str, value: Any) -> None:
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._value


class TritonError:
    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class TritonModelException(Exception):
    pass


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.made: dict[str, _Metric] = {}

    def Metric(self, *, labels: dict[str, str]) -> _Metric:
        own = [value for name, value in labels.items() if name not in ("model", "version", "replica")]
        return self.made.setdefault(" ".join(own), _Metric(self.kind))


class _Metric:
    def __init__(self, kind: str) -> None:
        self.kind, self.value, self.calls = kind, 0.0, 0

    def increment(self, amount: float) -> None:
        assert self.kind == "counter"
        assert amount > 0
        self.value += amount
        self.calls += 1

    def set(self, value: float) -> None:
        assert self.kind == "gauge"
        self.value = value
        self.calls += 1


def fake_triton() -> ModuleType:
    module: Any = ModuleType("triton_python_backend_utils")
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    module.TritonError, module.TritonModelException = TritonError, TritonModelException
    module.log = []
    names = ("log_info", "log_error")
    module.Logger = type("Logger", (), dict.fromkeys(names, staticmethod(module.log.append)))
    module.Tensor = lambda name, value: (name, value)
    module.families = {}

    def input_tensor(request: Request, name: str) -> _Tensor | None:
        return next((tensor for tensor in request.inputs() if tensor.name() == name), None)

    module.get_input_tensor_by_name = input_tensor

    def family(**fields: Any) -> MetricFamily:
        return module.families.setdefault(fields["name"], MetricFamily(**fields))

    family.COUNTER, family.GAUGE = MetricFamily.COUNTER, MetricFamily.GAUGE  # type: ignore[attr-defined]
    module.MetricFamily = family

    def response(*, output_tensors: Any = (), error: Any = None) -> dict[str, Any]:
        return {**dict(output_tensors), "error": error}

    module.InferenceResponse = response
    return module  # type: ignore[no-any-return]


class Handle:
    def __init__(self, on_delta: Callable[[Delta], object]) -> None:
        self.on_delta = on_delta
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        if not self.cancelled.is_set():
            self.cancelled.set()
            self.on_delta(Delta(0, "", (), (), "cancelled", USAGE))


class Service:
    """Keeps every request; tests push the deltas. The text "refuse" is refused, "fault" breaks; while it is
    `full` everyone is rejected."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.slots = 2
        self.handles: list[Handle] = []
        self.fields: list[dict[str, Any]] = []
        self.arrived = threading.Semaphore(0)
        self.counts: dict[str, Any] = {}
        self.closed = False
        self.refused = 0
        self.full = False
        self.urgency: list[tuple[int, float]] = []
        self.since: list[float] = []
        self.gate = threading.Event()  # a prompt is read when it is open
        self.gate.set()

    @classmethod
    def open(cls, folder: Any, **settings: Any) -> Service:
        return cls(settings)

    def check(self, level: int, timeout_s: float, arrived: float) -> None:
        self.checked = level, timeout_s, arrived
        if self.full:
            raise full(7)

    def submit(
        self,
        fields: dict[str, Any],
        on_delta: Callable[[Delta], object],
        *,
        level: int,
        timeout_s: float,
        arrived: float,
    ) -> Handle:
        assert self.gate.wait(5)
        if fields.get("text") == b"refuse":
            refusal = BadRequest("'text' is refused")
            self.refuse(refusal)
            raise refusal
        if fields.get("text") == b"fault":
            raise ZeroDivisionError("while reading: fault")
        handle = Handle(on_delta)
        self.fields.append(fields)
        self.urgency.append((level, timeout_s))
        self.since.append(arrived)
        self.handles.append(handle)
        self.arrived.release()
        return handle

    def refuse(self, error: Exception) -> None:
        self.refused += 1

    def snapshot(self) -> dict[str, Any]:
        return dict(self.counts)

    def close(self) -> None:
        self.closed = True
