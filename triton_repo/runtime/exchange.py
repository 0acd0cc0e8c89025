"""One request's way back to Triton: its response sender, errors with their codes, and whether anyone listens.

Nothing of Triton is imported: a model file passes its `triton_python_backend_utils` in.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from triton_repo.runtime.admission import Busy
from triton_repo.runtime.events import line
from triton_repo.runtime.texts import BadRequest, EngineFailed

_MOST_LINES = 5

Answer = Mapping[str, npt.NDArray[Any]] | Exception


class Cancelled(Exception):
    """The client gave up; nobody reads this but a client that cancelled and still listens."""


def explain(error: Exception) -> Exception:
    """`error` as its sender may read it. An unforeseen one is named, but its text may hold the request's."""
    if type(error) in {BadRequest, Busy, Cancelled, EngineFailed}:
        return error
    return EngineFailed(f"the server failed on this request: {type(error).__name__}")


def reason_of(error: Exception) -> str:
    """The word that metrics and log have for it; "" for a request that was cancelled."""
    if isinstance(error, Busy):
        return error.reason
    if isinstance(error, BadRequest):
        return "bad_input"
    return "" if isinstance(error, Cancelled) else type(error).__name__


class EventLog:
    """Writes a line of Triton's log for a request of one model that was rejected or failed: its id and the
    reason, nothing of its text. No more than 5 in a second: each is a round trip to the server process, and
    a crowd that is rejected must not keep it busy. The metrics count all."""

    def __init__(self, pb_utils: Any, model: str) -> None:
        self._log = pb_utils.Logger
        self._model = model
        self._second = self._written = 0

    def ended(self, error: Exception, request_id: str) -> None:
        """Never raises: the answer is worth more than the line."""
        reason = reason_of(error)
        if not reason or not self._has_room():
            return
        rejected = isinstance(error, Busy | BadRequest)
        event = "rejected" if rejected else "failed"
        words = line(model=self._model, event=event, reason=reason, request_id=request_id)
        with contextlib.suppress(Exception):
            (self._log.log_info if rejected else self._log.log_error)(words)

    def _has_room(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._written = second, 0
        self._written += 1
        return self._written <= _MOST_LINES


def id_of(request: Any) -> str:
    """A request's id, which over HTTP may be any bytes: what is not UTF-8 is escaped."""
    try:
        return str(request.request_id())
    except UnicodeDecodeError as error:
        return error.object.decode(errors="backslashreplace")


def parameters_of(request: Any) -> str:
    """A request's parameters as JSON. Raises BadRequest: over HTTP they may be any bytes too."""
    try:
        return str(request.parameters())
    except UnicodeDecodeError:
        raise BadRequest("the request's parameters are not valid UTF-8") from None


class Exchange:
    """A response sender that is used up by the last response; from any thread.

    `closed` is called with it when that response is on its way.
    """

    def __init__(
        self,
        pb_utils: Any,
        request: Any,
        log: EventLog,
        closed: Callable[[Exchange], None] = lambda exchange: None,
    ) -> None:
        self._pb = pb_utils
        self._sender = request.get_response_sender()
        self._request_id = id_of(request)
        self._log = log
        self._closed = closed
        # A sender must not be asked about a client once its last response is on its way.
        self._lock = threading.Lock()

    def send(self, answer: Answer, final: bool = True) -> None:
        """Send one response, the request's last one if `final`; nothing more is sent behind that.

        Raises what Triton raises. The request has ended then.
        """
        with self._lock:
            sender = self._sender
            if sender is None:
                return
            if isinstance(answer, Exception):
                self._log.ended(answer, self._request_id)
            try:
                sender.send(to_response(self._pb, answer), flags=self._flag(final))
            except Exception:
                # No room in shared memory, most likely; an error takes less than an answer.
                final = True
                self._send_failure(sender)
                raise
            finally:
                if final:
                    self._sender = None
                    self._closed(self)

    def is_gone(self) -> bool:
        """Whether the client went away: a round trip to the server process, 0.1 ms of processor time. Raises
        what Triton raises."""
        with self._lock:
            return self._sender is not None and bool(self._sender.is_cancelled())

    def _send_failure(self, sender: Any) -> None:
        failure = EngineFailed("the answer could not be sent: the server's shared memory is full")
        try:
            sender.send(to_response(self._pb, failure), flags=self._flag(True))
        except Exception:
            with contextlib.suppress(Exception):
                sender.send(flags=self._flag(True))

    def _flag(self, final: bool) -> int:
        return int(self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL) if final else 0


def to_response(pb_utils: Any, answer: Answer) -> Any:
    """Triton's response of an answer."""
    if isinstance(answer, Exception):
        told = explain(answer)
        codes = pb_utils.TritonError
        code = {
            BadRequest: codes.INVALID_ARG,
            Busy: codes.UNAVAILABLE,
            Cancelled: codes.CANCELLED,
            EngineFailed: codes.INTERNAL,
        }[type(told)]
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(told), code))
    tensors = [pb_utils.Tensor(name, value) for name, value in answer.items()]
    return pb_utils.InferenceResponse(output_tensors=tensors)
