"""Model control of a running server, and inference requests to one version of a model, over gRPC."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from build_engines.errors import ServerError
from triton_repo.running import Running
from triton_repo.server_log import reason_of

# How the errors begin where the server takes no work now. A stream's have no code, and the code that others
# have is also that of a server that is gone.
_BUSY: Final = ("the queue is full", "the wait ")
_CONTROL_S, _ANSWER_S = 30.0, 60.0

Arrays = dict[str, npt.NDArray[Any]]
Input = bytes | list[bytes] | bool | int
Phase = Literal["LOADING", "READY", "UNLOADING", "UNAVAILABLE"]


class Busy(Exception):
    """The server took no request now: its queue is full, or the wait too long."""


@dataclass(frozen=True, slots=True)
class State:
    """Of one version of a model; `reason`: why it is not available."""

    phase: Phase
    reason: str = ""

    @property
    def served(self) -> bool:
        """Whether this version answers requests or has, since the server started."""
        return self.phase != "UNAVAILABLE" or self.reason == "unloaded"


class ControlsModels(Protocol):
    """What a rollout needs of a running server; `Control` is one."""

    def states(self) -> dict[str, dict[int, State]]: ...

    def load(self, config: Any, timeout_s: float) -> None: ...

    def unload(self, name: str) -> None: ...

    def ask(self, name: str, version: int, inputs: Mapping[str, Input], *, batched: bool) -> Arrays: ...


class Control:
    """A connection to a running server. Raises ServerError for whatever it refuses."""

    def __init__(self, running: Running) -> None:
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        name, key = running.admin_header
        self._admin = ((name, key),)
        self._url = running.urls["grpc"]
        # The environment's http_proxy is not for a server of our own: it would read the admin key.
        self._channel = grpc.insecure_channel(self._url, options=[("grpc.enable_http_proxy", 0)])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def states(self) -> dict[str, dict[int, State]]:
        """Every version that the server knows, by model; models that it never loaded have none."""
        from tritonclient.grpc import service_pb2

        found: dict[str, dict[int, State]] = {}
        index = self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest(), _CONTROL_S)
        for entry in index.models:
            versions = found.setdefault(entry.name, {})
            if entry.version:
                versions[int(entry.version)] = State(entry.state or "UNAVAILABLE", entry.reason)
        return found

    def load(self, config: Any, timeout_s: float) -> None:
        """Have the version that a ModelConfig names loaded, by that config, whatever the disk says.

        Returns when it is ready and has taken over; the one before may still answer what it has begun.
        """
        from google.protobuf import json_format
        from tritonclient.grpc import service_pb2

        fields = json_format.MessageToDict(config, preserving_proto_field_name=True)
        # Left out of JSON as a zero, and to Triton a missing one means something else.
        fields.setdefault("max_batch_size", 0)
        request = service_pb2.RepositoryModelLoadRequest(model_name=config.name)
        request.parameters["config"].string_param = json.dumps(fields)
        self._call("RepositoryModelLoad", request, timeout_s)

    def unload(self, name: str) -> None:
        """Have no new request answered by the model. Returns before what it has begun is answered."""
        from tritonclient.grpc import service_pb2

        self._call(
            "RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name=name), _CONTROL_S
        )

    def ask(self, name: str, version: int, inputs: Mapping[str, Input], *, batched: bool) -> Arrays:
        """Outputs of one request to one version, none where the response cache has kept a rejection of it;
        `batched`: its tensors have a batch dimension (1).

        Raises Busy where the server takes no work now, ServerError for any other failure.
        """
        import grpc

        message = _message(name, version, inputs, batched=batched)
        try:
            answer = self._unary(message) if batched else self._streamed(message)
        except grpc.RpcError as error:
            details = str(error.details())
            if details.startswith(_BUSY):
                raise Busy(details) from None
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise self._gone(details) from None
            raise ServerError(f"{name} version {version}: {reason_of(details):.300}") from None
        if answer.model_version != str(version):
            raise ServerError(f"{name}: version {answer.model_version} answered for version {version}")
        return _outputs(answer)

    def _unary(self, message: Any) -> Any:
        return self._stub.ModelInfer(message, timeout=_ANSWER_S)

    def _streamed(self, message: Any) -> Any:
        """A decoupled model's only response that has outputs."""
        where = f"{message.model_name} version {message.model_version}"
        found = []
        for response in self._stub.ModelStreamInfer(iter([message]), timeout=_ANSWER_S):
            if response.error_message:
                if response.error_message.startswith(_BUSY):
                    raise Busy(response.error_message)
                raise ServerError(f"{where}: {response.error_message}")
            if response.infer_response.outputs:
                found.append(response.infer_response)
        if len(found) != 1:
            raise ServerError(f"{where}: {len(found)} answers instead of one")
        return found[0]

    def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        import grpc

        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._admin)
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details())
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServerError(
                    f"the server has not answered within {timeout_s:.0f} s",
                    next_step="allow more: --ready-timeout",
                ) from None
            if code == grpc.StatusCode.UNAVAILABLE:
                raise self._gone(details) from None
            raise ServerError(reason_of(details)) from None

    def _gone(self, details: str) -> ServerError:
        return ServerError(
            f"the server at {self._url} is gone ({details:.200})",
            next_step="start it again: it serves what it served before (triton-repo serve)",
        )


def _message(name: str, version: int, inputs: Mapping[str, Input], *, batched: bool) -> Any:
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=name, model_version=str(version))
    for tensor, value in inputs.items():
        datatype, content, count = _raw(value)
        shape = [1, count] if batched else [count]
        message.inputs.add(name=tensor, datatype=datatype, shape=shape)
        message.raw_input_contents.append(content)
    return message


def _raw(value: Input) -> tuple[str, bytes, int]:
    """Datatype, Triton's raw form and number of elements."""
    if isinstance(value, bool):
        return "BOOL", struct.pack("<?", value), 1
    if isinstance(value, int):
        return "INT32", struct.pack("<i", value), 1
    texts = value if isinstance(value, list) else [value]
    return "BYTES", b"".join(struct.pack("<I", len(text)) + text for text in texts), len(texts)


def _outputs(answer: Any) -> Arrays:
    from tritonclient.grpc import InferResult

    result = InferResult(answer)
    return {output.name: np.asarray(result.as_numpy(output.name)) for output in answer.outputs}
