"""Blocking transports over tritonclient."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gevent
import grpc
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc._utils import get_error_grpc
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from . import triton_streams, wire
from .access import Access
from .codec import InferReply, InferRequest
from .failures import translate
from .transport import Endpoint, Question


class Grpc:
    def __init__(self, endpoint: Endpoint, access: Access) -> None:
        self.endpoint, self._access = endpoint, access
        credentials = access.channel_credentials() if endpoint.tls else None
        self._client = tritonclient.grpc.InferenceServerClient(
            endpoint.address, creds=credentials, channel_args=wire.channel_arguments(endpoint.address)
        )
        self._channel: Any = None  # for streams and brief calls; opened with the first
        self._left: set[Any] = set()  # calls that nobody waits for any more
        self._lock = threading.Lock()

    def infer(self, request: InferRequest, timeout: float) -> InferReply:
        try:
            # A longer wait hardly ends in the moment of its answer; a plain call takes 0.14 of 1.1 ms less.
            if timeout < wire.GRACE_S:
                return self._infer_briefly(request, timeout)
            arguments = wire.infer_arguments(tritonclient.grpc, request, timeout, self._access)
            return wire.reply_of(request, self._client.infer(**arguments, client_timeout=timeout))
        except Exception as error:
            raise translate(
                error, url=self.endpoint.url, model=request.model, request_id=request.request_id
            ) from error

    def _infer_briefly(self, request: InferRequest, timeout: float) -> InferReply:
        """A call that is late gets its time to end. tritonclient's such calls are not for several threads:
        its object remembers one."""
        call = GRPCInferenceServiceStub(self._own_channel()).ModelInfer.future(
            wire.infer_message(request, timeout),
            timeout=timeout + wire.GRACE_S,
            metadata=tuple(self._access.headers(request.request_id).items()),
        )
        try:
            return wire.reply_of(request, tritonclient.grpc.InferResult(call.result(timeout)))
        except grpc.FutureTimeoutError:
            self._left.add(call)
            call.add_done_callback(self._left.discard)
            raise TimeoutError from None
        except grpc.RpcError as error:
            raise get_error_grpc(error) from error

    def stream(self, request: InferRequest, timeout: float) -> triton_streams.Grpc:
        metadata = self._access.headers(request.request_id)
        return triton_streams.Grpc(self._own_channel(), self.endpoint.url, request, timeout, metadata)

    def _own_channel(self) -> Any:
        with self._lock:
            if self._channel is None:
                self._channel = triton_streams.open_channel(self.endpoint, self._access)
            return self._channel

    def ask(self, question: Question, model: str, timeout: float) -> Any:
        method = getattr(self._client, wire.QUESTIONS[question])
        try:
            return method(
                *wire.question_arguments(question, model),
                as_json=True,
                client_timeout=timeout,
                headers=self._access.headers(),
            )
        except Exception as error:
            raise translate(error, url=self.endpoint.url, model=model or None, request_id=None) from error

    def close(self) -> None:
        deadline = time.monotonic() + wire.GRACE_S
        for call in tuple(self._left):
            with suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                call.result(max(0.0, deadline - time.monotonic()))
        self._client.close()
        if self._channel is not None:
            self._channel.close()


class Http:
    """tritonclient's HTTP client runs on gevent, whose sockets belong to one thread: one per thread."""

    def __init__(self, endpoint: Endpoint, access: Access) -> None:
        self.endpoint, self._access = endpoint, access
        self._local = threading.local()

    def _client(self) -> Any:
        client = getattr(self._local, "client", None)
        if client is None:
            # Its own timeouts are off: each call has its own, below.
            client = tritonclient.http.InferenceServerClient(
                self.endpoint.address,
                ssl=self.endpoint.tls,
                # Named in this way they take the place of the usual authorities instead of joining them.
                ssl_options={"ca_certs": str(self._access.ca)} if self._access.ca else None,
                connection_timeout=None,
                network_timeout=None,
            )
            self._local.client = client
        return client

    def infer(self, request: InferRequest, timeout: float) -> InferReply:
        try:
            arguments = wire.infer_arguments(tritonclient.http, request, timeout, self._access)
            with self._within(timeout):
                return wire.reply_of(request, self._client().infer(**arguments))
        except Exception as error:
            raise translate(
                error, url=self.endpoint.url, model=request.model, request_id=request.request_id
            ) from error

    def stream(self, request: InferRequest, timeout: float) -> triton_streams.Http:
        return triton_streams.Http(self.endpoint, self._access, request, timeout)

    def ask(self, question: Question, model: str, timeout: float) -> Any:
        try:
            with self._within(timeout):
                method = getattr(self._client(), wire.QUESTIONS[question])
                return method(*wire.question_arguments(question, model), headers=self._access.headers())
        except Exception as error:
            raise translate(error, url=self.endpoint.url, model=model or None, request_id=None) from error

    @contextmanager
    def _within(self, timeout: float) -> Iterator[None]:
        # gevent's own Timeout is no Exception, so that nothing below takes it for a broken connection and
        # tries again. Interrupted anywhere, the connection may owe an answer: it is dropped with its client.
        try:
            with gevent.Timeout(timeout):
                yield
        except gevent.Timeout:
            client, self._local.client = self._client(), None
            client.close()
            raise TimeoutError from None

    def close(self) -> None:
        # Clients of other threads close when their thread, or this object, is gone.
        client = getattr(self._local, "client", None)
        if client is not None:
            client.close()
        self._local = threading.local()
