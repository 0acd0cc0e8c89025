"""What the four transports share: tritonclient's input objects, its results, and channel settings."""

from __future__ import annotations

from typing import Any

from .access import Access, is_loopback
from .codec import InferReply, InferRequest
from .transport import host_of

# gRPC waits longer and longer before it connects again to a server that was away; our own retries are the
# ones with a policy, so the channel's are kept short. Message sizes as tritonclient's default.
CHANNEL_ARGUMENTS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
# gRPC asks the proxy that the environment names (grpc_proxy, https_proxy, http_proxy) even for this machine.
_DIRECT = ("grpc.enable_http_proxy", 0)
# Triton 2.51 crashes when a unary gRPC call is cancelled, or its deadline passes, in the microsecond of its
# answer: here after 200 to 1,800 deadlines of a few ms (mended by the server's pull requests 7840 and 8078).
# So a caller whose time is over just stops waiting, and the call is given up so many seconds later. It has
# mostly been answered by then: the model is told the caller's time.
GRACE_S = 1.0
# Triton's own priority reaches no Python model, so the models read a parameter of ours.
PRIORITY = "onecard_priority"


def channel_arguments(address: str) -> list[tuple[str, Any]]:
    """Of a channel to host:port. What goes to this machine goes through no proxy, which would read it."""
    return [*CHANNEL_ARGUMENTS, _DIRECT] if is_loopback(host_of(address)) else CHANNEL_ARGUMENTS


def infer_arguments(module: Any, request: InferRequest, timeout: float, access: Access) -> dict[str, Any]:
    """Keyword arguments of tritonclient's `infer`; `module` is tritonclient.grpc or tritonclient.http."""
    return {
        "model_name": request.model,
        "inputs": input_tensors(module, request),
        "request_id": request.request_id,
        "timeout": microseconds(timeout),
        "parameters": {PRIORITY: request.priority} if request.priority else None,
        "headers": access.headers(request.request_id),
    }


def microseconds(timeout: float) -> int:
    """The time left, as Triton carries it: the model drops a request that nobody waits for any more."""
    return max(1, int(timeout * 1e6))


def input_tensors(module: Any, request: InferRequest) -> list[Any]:
    from tritonclient.utils import np_to_triton_dtype

    tensors = []
    for name, array in request.inputs.items():
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def infer_message(request: InferRequest, timeout: float | None = None) -> Any:
    """The ModelInferRequest of a call or a stream; `timeout` in seconds is for its first response.

    A stream is opened without Triton's header `triton_grpc_error`, which would turn an error text into a
    status: with it Triton 2.51 crashes within some tens of errors (signal 11).
    """
    import tritonclient.grpc
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=request.model, id=request.request_id)
    for tensor in input_tensors(tritonclient.grpc, request):
        message.inputs.append(tensor._get_tensor())
        message.raw_input_contents.append(tensor._get_content())
    if timeout is not None:
        message.parameters["timeout"].int64_param = microseconds(timeout)
    if request.priority:
        message.parameters[PRIORITY].int64_param = request.priority
    return message


def stream_reply(request: InferRequest, response: Any) -> InferReply:
    """From one ModelStreamInferResponse; raises InferenceServerException for a failure.

    It comes as a text without a code, so it is told apart by that text, as over HTTP.
    """
    from tritonclient.grpc import InferResult
    from tritonclient.utils import InferenceServerException

    if response.error_message:
        raise InferenceServerException(msg=response.error_message, status="400")
    return reply_of(request, InferResult(response.infer_response))


def reply_of(request: InferRequest, result: Any) -> InferReply:
    """Outputs the server left out are left out here too; the codec says what is missing."""
    arrays = {name: result.as_numpy(name) for name in request.outputs}
    present = {name: array for name, array in arrays.items() if array is not None}
    response = result.get_response()
    # tritonclient's HTTP gives the response's JSON, its gRPC the message.
    version = response.get("model_version") if isinstance(response, dict) else response.model_version
    return InferReply(request.model, request.request_id, present, str(version or ""))


QUESTIONS = {
    "config": "get_model_config",
    "statistics": "get_inference_statistics",
    "metadata": "get_server_metadata",
}


def question_arguments(question: str, model: str) -> tuple[str, ...]:
    return (model,) if question == "config" else ()
