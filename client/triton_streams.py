"""Blocking streams of responses: gRPC's ModelStreamInfer, a call for each request, and server-sent events.

tritonclient allows a client object one stream, which it cancels as a whole; a call of its own for each
request can be cancelled by itself, and shares the channel.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

import grpc
from tritonclient.grpc import service_pb2_grpc
from tritonclient.grpc._utils import get_error_grpc

from . import sse, wire
from .access import Access
from .codec import InferReply, InferRequest
from .errors import Cancelled, ClientError, DeadlineExceeded
from .failures import translate
from .transport import Endpoint
from .watch import Watch


def open_channel(endpoint: Endpoint, access: Access) -> Any:
    options = wire.channel_arguments(endpoint.address)
    if endpoint.tls:
        credentials = access.channel_credentials()
        return grpc.secure_channel(endpoint.address, credentials, options=options)
    return grpc.insecure_channel(endpoint.address, options=options)


def stream_failure(error: BaseException, url: str, request: InferRequest) -> ClientError:
    """Our error for one that a stream ended with, other than by being closed here."""
    if isinstance(error, grpc.RpcError):
        if error.code() is grpc.StatusCode.CANCELLED:
            return Cancelled(
                error.details() or "the server ended the generation",
                model=request.model,
                request_id=request.request_id,
            )
        error = get_error_grpc(error)
    return translate(error, url=url, model=request.model, request_id=request.request_id)


class Grpc:
    """One call. Our side sends one request and is done; Triton ends the call after the last response."""

    def __init__(
        self, channel: Any, url: str, request: InferRequest, timeout: float, metadata: Mapping[str, str]
    ) -> None:
        self._url, self._request, self._timeout = url, request, timeout
        self._closed = False
        try:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            message = wire.infer_message(request, timeout)
            self._call = stub.ModelStreamInfer(iter([message]), metadata=tuple(metadata.items()))
        except Exception as error:
            raise stream_failure(error, url, request) from error
        self._watch = Watch(self._call.cancel)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> InferReply:
        if self._closed:
            raise StopIteration
        self._watch.begin(self._timeout)
        try:
            response = next(self._call)
            if response.error_message:
                # The call is about to end. If it is cancelled just then, Triton 2.51 may never release it.
                for _ in self._call:
                    pass
            self._watch.end()
            return wire.stream_reply(self._request, response)
        except StopIteration:
            self.close()
            raise
        except Exception as error:
            if self._closed:
                raise StopIteration from None
            self.close()
            if self._watch.expired:
                raise DeadlineExceeded(
                    f"no answer from {self._url} in time",
                    model=self._request.model,
                    request_id=self._request.request_id,
                ) from error
            raise stream_failure(error, self._url, self._request) from error
        except BaseException:  # an interrupt of the program
            self.close()
            raise

    def close(self) -> None:
        self._closed = True
        self._watch.stop()
        self._call.cancel()  # without effect on one that has ended

    def __del__(self) -> None:
        if hasattr(self, "_watch"):
            self.close()


class Http:
    """One connection, closed with the stream: that is how Triton learns that nobody reads any more."""

    def __init__(self, endpoint: Endpoint, access: Access, request: InferRequest, timeout: float) -> None:
        self._url, self._request = endpoint.url, request
        self._closed = False
        self._socket: socket.socket | None = None
        host, _, base = endpoint.address.partition("/")
        self._path = f"/{base}{sse.path(request)}" if base else sse.path(request)
        if endpoint.tls:
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, timeout=timeout, context=access.context
            )
        else:
            self._connection = http.client.HTTPConnection(host, timeout=timeout)
        self._response: http.client.HTTPResponse | None = None
        try:
            self._connection.connect()
            self._socket = self._connection.sock
            headers = {"Content-Type": "application/json", **access.headers(request.request_id)}
            self._connection.request("POST", self._path, sse.body(request, timeout), headers)
        except Exception as error:
            self.close()
            raise stream_failure(error, self._url, request) from error

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> InferReply:
        if self._closed:
            raise StopIteration
        try:
            return self._next()
        except StopIteration:
            self.close()
            raise
        except Exception as error:
            if self._closed:
                raise StopIteration from None
            self.close()
            if isinstance(error, ClientError):
                raise
            raise stream_failure(error, self._url, self._request) from error
        except BaseException:
            self.close()
            raise

    def _next(self) -> InferReply:
        if self._response is None:
            self._response = self._connection.getresponse()
        status = self._response.status
        while line := self._response.readline():
            data = sse.event(line)
            if data is None and status >= 400 and line.strip():
                data = line.strip()  # refused before there was a stream: the body is JSON alone
            if data is not None:
                return sse.reply(self._request, data, status)
        raise StopIteration

    def close(self) -> None:
        self._closed = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # ends a read that another thread waits in
        self._connection.close()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self.close()
