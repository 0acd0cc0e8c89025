"""The blocking client."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

from . import flows, generate_flows, metrics
from .access import Access, AccessOptions
from .codec import InferReply, InferRequest, parse_model_info
from .errors import ClientError, InvalidInput, UnknownModel
from .flows import CallOptions, Flow, split_options
from .generate import GenerateOptions, Prompt, PromptOptions
from .retry import Attempts, Budget, Clock, RetryPolicy
from .status import server_status
from .streams import Single, Stream
from .transport import Endpoint, Transport, open_transport
from .types import Classification, Embedding, Generation, ModelInfo, Ranked, ServerStatus

T = TypeVar("T")
IN_FLIGHT = 4  # requests of one long list that wait at the server together
STREAMS = 16  # prompts of one list that are generated together


class Client:
    """Classifies, embeds, ranks and generates through a running server; safe to share between threads.

    `url` is host:port or has a scheme (grpc, grpcs, http, https); left out, it comes from ONECARD_URL_GRPC or
    ONECARD_URL_HTTP, else it is this machine. `timeout` is the time in seconds for a whole call, with all its
    requests and retries. `token` and `ca` are for a server behind TLS (AccessOptions). Every failure is a
    ClientError.
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: str | None = None,
        *,
        timeout: float = 60.0,
        retry: RetryPolicy | None = None,
        transport: Transport | None = None,
        clock: Clock | None = None,
        **access: Unpack[AccessOptions],
    ) -> None:
        self._timeout = flows.check_timeout(timeout)
        if transport is None:
            endpoint = Endpoint.parse(url, protocol)
            transport = open_transport(endpoint, Access.of(endpoint, access))
        self._transport = transport
        self._retry = retry or RetryPolicy()
        self._clock = clock or Clock()
        self._budget = Budget(self._retry)
        self._models: dict[str, ModelInfo] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        with self._lock:
            threads, self._threads = self._threads, None
        if threads:
            threads.shutdown(cancel_futures=True)
        self._transport.close()

    @overload
    def classify(self, texts: str, **options: Unpack[CallOptions]) -> Classification: ...  # type: ignore[overload-overlap]
    @overload
    def classify(self, texts: Iterable[str], **options: Unpack[CallOptions]) -> list[Classification]: ...
    def classify(
        self, texts: str | Iterable[str], **options: Unpack[CallOptions]
    ) -> Classification | list[Classification]:
        """A label with its score for each text; one text gives one answer, a list a list in its order."""
        chosen, timeout = split_options(options)
        if isinstance(texts, str):
            return self._run(flows.single(flows.classify([texts], chosen)), timeout)
        return self._run(flows.classify(texts, chosen), timeout)

    @overload
    def embed(self, texts: str, **options: Unpack[CallOptions]) -> Embedding: ...  # type: ignore[overload-overlap]
    @overload
    def embed(self, texts: Iterable[str], **options: Unpack[CallOptions]) -> list[Embedding]: ...
    def embed(
        self, texts: str | Iterable[str], **options: Unpack[CallOptions]
    ) -> Embedding | list[Embedding]:
        """A vector for each text; one text gives one answer, a list a list in its order."""
        chosen, timeout = split_options(options)
        if isinstance(texts, str):
            return self._run(flows.single(flows.embed([texts], chosen)), timeout)
        return self._run(flows.embed(texts, chosen), timeout)

    def rerank(self, query: str, passages: Iterable[str], **options: Unpack[CallOptions]) -> list[Ranked]:
        """The passages with their scores for the query, best first."""
        chosen, timeout = split_options(options)
        return self._run(flows.rerank(query, passages, chosen), timeout)

    @overload
    def generate(self, prompts: str, **options: Unpack[PromptOptions]) -> Generation: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Iterable[str], **options: Unpack[PromptOptions]) -> list[Generation]: ...
    def generate(
        self, prompts: str | Iterable[str], **options: Unpack[PromptOptions]
    ) -> Generation | list[Generation]:
        """The continuation of each prompt; one prompt gives one answer, a list a list in its order.

        A prompt goes to the model as it is; with `chat` or `system` it is the user's message, after the
        system prompt if there is one, in the model's chat template. The prompts of a list are generated
        together, as slots become free.
        """
        chosen, parameters, timeout = generate_flows.split_options(options, PromptOptions)
        given = generate_flows.prompts([prompts] if isinstance(prompts, str) else prompts, parameters)
        flow = generate_flows.complete(given, chosen, parameters)
        if isinstance(prompts, str):
            return self._run(flows.single(flow), timeout)
        return self._run(flow, timeout)

    def chat(
        self, messages: str | Sequence[Mapping[str, object]], **options: Unpack[GenerateOptions]
    ) -> Generation:
        """The model's next message: `messages` are dicts of role and content, oldest first, or one text."""
        chosen, parameters, timeout = generate_flows.split_options(options)
        given = [generate_flows.conversation(messages, parameters)]
        return self._run(flows.single(generate_flows.complete(given, chosen, parameters)), timeout)

    def stream(self, prompt: str, **options: Unpack[PromptOptions]) -> Stream:
        """As `generate`, for one prompt, in pieces as they come; `timeout` bounds the wait for each."""
        chosen, parameters, timeout = generate_flows.split_options(options, PromptOptions)
        [given] = generate_flows.prompts([prompt], parameters)
        return self._stream(given, chosen, parameters, timeout)

    def chat_stream(
        self, messages: str | Sequence[Mapping[str, object]], **options: Unpack[GenerateOptions]
    ) -> Stream:
        """As `chat`, in pieces as they come; `timeout` bounds the wait for each."""
        chosen, parameters, timeout = generate_flows.split_options(options)
        given = generate_flows.conversation(messages, parameters)
        return self._stream(given, chosen, parameters, timeout)

    def describe(self, model: str, *, timeout: float | None = None) -> ModelInfo:
        """What the model's configuration says: task, precision, largest batch, tensors."""
        return self._run(flows.describe(model), timeout)

    def status(self, *, timeout: float | None = None) -> ServerStatus:
        """The server's loaded models and what they have done."""
        return self._run(server_status(self._transport.endpoint), timeout)

    def _stream(
        self,
        given: Prompt,
        options: flows.Options,
        parameters: Mapping[str, Any],
        timeout: float | None,
    ) -> Stream:
        limit = self._timeout if timeout is None else flows.check_timeout(timeout)
        [request] = self._run(generate_flows.requests_for([given], options, parameters, stream=True), timeout)
        return Stream(
            lambda: self._transport.stream(request, limit),
            self._attempts(request, self._clock.now() + limit),
            self._clock,
            logprobs=bool(parameters.get("logprobs")),
        )

    def _run(self, flow: Flow[T], timeout: float | None) -> T:
        if self._closed:
            raise ClientError("the client is closed")
        deadline = self._clock.now() + (self._timeout if timeout is None else flows.check_timeout(timeout))
        try:
            effect = next(flow)
            while True:
                try:
                    answer = self._perform(effect, deadline)
                except ClientError as error:
                    effect = flow.throw(error)
                else:
                    effect = flow.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _perform(self, effect: flows.Effect, deadline: float) -> Any:
        if isinstance(effect, flows.InferAll):
            try:
                return self._infer_all(effect.requests, deadline)
            except (UnknownModel, InvalidInput):
                self._models.clear()  # the models may have changed since we asked
                raise
        if isinstance(effect, flows.ReadMetrics):
            return metrics.read(effect.address)
        if isinstance(effect, flows.Ask):
            return self._ask(effect.question, "", deadline)
        if effect.model not in self._models:
            self._models[effect.model] = parse_model_info(self._ask("config", effect.model, deadline))
        return self._models[effect.model]

    def _ask(self, question: Any, model: str, deadline: float) -> Any:
        attempts = Attempts(self._retry, self._clock, deadline)
        while True:
            try:
                return self._transport.ask(question, model, attempts.begin())
            except ClientError as error:
                self._clock.sleep(attempts.wait_after(error, idempotent=True))

    def _infer_decoupled(self, requests: tuple[InferRequest, ...], deadline: float) -> list[InferReply]:
        """The only response of each, several at once; a failure or an interrupt ends all the others."""
        calls = [Single(self._transport, request) for request in requests]
        if len(calls) == 1:
            return [calls[0].reply(self._attempts(requests[0], deadline), self._clock)]
        threads = ThreadPoolExecutor(min(len(calls), STREAMS), thread_name_prefix="onecard-client")
        try:
            futures = [
                threads.submit(call.reply, self._attempts(request, deadline), self._clock)
                for call, request in zip(calls, requests, strict=True)
            ]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future in done and future.exception()]
            return [future.result() for future in failed or futures]
        finally:
            for call in calls:
                call.close()
            threads.shutdown(cancel_futures=True)

    def _attempts(self, request: InferRequest, deadline: float) -> Attempts:
        return Attempts(self._retry, self._clock, deadline, request, self._budget)

    def _infer(self, request: InferRequest, deadline: float) -> InferReply:
        attempts = self._attempts(request, deadline)
        while True:
            try:
                reply = self._transport.infer(request, attempts.begin())
                attempts.end("completed", version=reply.version)
                return reply
            except ClientError as error:
                self._clock.sleep(
                    attempts.wait_after(flows.located(error, request), idempotent=request.idempotent)
                )

    def _infer_all(self, requests: tuple[InferRequest, ...], deadline: float) -> list[InferReply]:
        if requests[0].decoupled:
            return self._infer_decoupled(requests, deadline)
        if len(requests) == 1:
            return [self._infer(requests[0], deadline)]
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="onecard-client")
            threads = self._threads
        futures: list[Future[InferReply]] = [
            threads.submit(self._infer, request, deadline) for request in requests
        ]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()  # without effect unless one failed before the others started
        failed = [future for future in futures if not future.cancelled() and future.exception()]
        return [future.result() for future in failed or futures]
