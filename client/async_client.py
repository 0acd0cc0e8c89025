"""The asyncio client: the same calls as Client, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload

from . import flows, generate_flows, metrics
from .access import Access, AccessOptions
from .codec import InferReply, InferRequest, parse_model_info
from .errors import ClientError, InvalidInput, UnexpectedAnswer, UnknownModel
from .flows import CallOptions, Flow, split_options
from .generate import GenerateOptions, Prompt, PromptOptions
from .retry import Attempts, Budget, Clock, RetryPolicy
from .status import server_status
from .streams import AsyncStream
from .transport import AsyncReplyStream, AsyncTransport, Endpoint, open_async_transport
from .types import Classification, Embedding, Generation, ModelInfo, Ranked, ServerStatus

T = TypeVar("T")
IN_FLIGHT = 8  # requests of one long list that wait at the server together
STREAMS = 16  # prompts of one list that are generated together


class AsyncClient:
    """As Client, for one event loop: `async with AsyncClient() as client: await client.embed("text")`."""

    def __init__(
        self,
        url: str | None = None,
        protocol: str | None = None,
        *,
        timeout: float = 60.0,
        retry: RetryPolicy | None = None,
        transport: AsyncTransport | None = None,
        clock: Clock | None = None,
        **access: Unpack[AccessOptions],
    ) -> None:
        self._timeout = flows.check_timeout(timeout)
        if transport is None:
            endpoint = Endpoint.parse(url, protocol)
            transport = open_async_transport(endpoint, Access.of(endpoint, access))
        self._transport = transport
        self._retry = retry or RetryPolicy()
        self._clock = clock or Clock()
        self._budget = Budget(self._retry)
        self._models: dict[str, ModelInfo] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._closed = True
        await self._transport.close()

    @overload
    async def classify(self, texts: str, **options: Unpack[CallOptions]) -> Classification: ...  # type: ignore[overload-overlap]
    @overload
    async def classify(
        self, texts: Iterable[str], **options: Unpack[CallOptions]
    ) -> list[Classification]: ...
    async def classify(
        self, texts: str | Iterable[str], **options: Unpack[CallOptions]
    ) -> Classification | list[Classification]:
        """A label with its score for each text; one text gives one answer, a list a list in its order."""
        chosen, timeout = split_options(options)
        if isinstance(texts, str):
            return await self._run(flows.single(flows.classify([texts], chosen)), timeout)
        return await self._run(flows.classify(texts, chosen), timeout)

    @overload
    async def embed(self, texts: str, **options: Unpack[CallOptions]) -> Embedding: ...  # type: ignore[overload-overlap]
    @overload
    async def embed(self, texts: Iterable[str], **options: Unpack[CallOptions]) -> list[Embedding]: ...
    async def embed(
        self, texts: str | Iterable[str], **options: Unpack[CallOptions]
    ) -> Embedding | list[Embedding]:
        """A vector for each text; one text gives one answer, a list a list in its order."""
        chosen, timeout = split_options(options)
        if isinstance(texts, str):
            return await self._run(flows.single(flows.embed([texts], chosen)), timeout)
        return await self._run(flows.embed(texts, chosen), timeout)

    async def rerank(
        self, query: str, passages: Iterable[str], **options: Unpack[CallOptions]
    ) -> list[Ranked]:
        """The passages with their scores for the query, best first."""
        chosen, timeout = split_options(options)
        return await self._run(flows.rerank(query, passages, chosen), timeout)

    @overload
    async def generate(self, prompts: str, **options: Unpack[PromptOptions]) -> Generation: ...  # type: ignore[overload-overlap]
    @overload
    async def generate(
        self, prompts: Iterable[str], **options: Unpack[PromptOptions]
    ) -> list[Generation]: ...
    async def generate(
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
            return await self._run(flows.single(flow), timeout)
        return await self._run(flow, timeout)

    async def chat(
        self, messages: str | Sequence[Mapping[str, object]], **options: Unpack[GenerateOptions]
    ) -> Generation:
        """The model's next message: `messages` are dicts of role and content, oldest first, or one text."""
        chosen, parameters, timeout = generate_flows.split_options(options)
        given = [generate_flows.conversation(messages, parameters)]
        return await self._run(flows.single(generate_flows.complete(given, chosen, parameters)), timeout)

    def stream(self, prompt: str, **options: Unpack[PromptOptions]) -> AsyncStream:
        """As `generate`, for one prompt, in pieces as they come; `timeout` bounds the wait for each."""
        chosen, parameters, timeout = generate_flows.split_options(options, PromptOptions)
        [given] = generate_flows.prompts([prompt], parameters)
        return self._stream(given, chosen, parameters, timeout)

    def chat_stream(
        self, messages: str | Sequence[Mapping[str, object]], **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """As `chat`, in pieces as they come; `timeout` bounds the wait for each."""
        chosen, parameters, timeout = generate_flows.split_options(options)
        given = generate_flows.conversation(messages, parameters)
        return self._stream(given, chosen, parameters, timeout)

    async def describe(self, model: str, *, timeout: float | None = None) -> ModelInfo:
        """What the model's configuration says: task, precision, largest batch, tensors."""
        return await self._run(flows.describe(model), timeout)

    async def status(self, *, timeout: float | None = None) -> ServerStatus:
        """The server's loaded models and what they have done."""
        return await self._run(server_status(self._transport.endpoint), timeout)

    def _stream(
        self,
        given: Prompt,
        options: flows.Options,
        parameters: Mapping[str, Any],
        timeout: float | None,
    ) -> AsyncStream:
        limit = self._timeout if timeout is None else flows.check_timeout(timeout)
        generate_flows.check(parameters)

        async def start() -> tuple[InferRequest, AsyncReplyStream]:
            [request] = await self._run(
                generate_flows.requests_for([given], options, parameters, stream=True), timeout
            )
            return request, self._transport.stream(request, limit)

        return AsyncStream(
            start,
            self._attempts(None, self._clock.now() + limit),
            self._clock,
            logprobs=bool(parameters.get("logprobs")),
        )

    async def _run(self, flow: Flow[T], timeout: float | None) -> T:
        if self._closed:
            raise ClientError("the client is closed")
        deadline = self._clock.now() + (self._timeout if timeout is None else flows.check_timeout(timeout))
        try:
            effect = next(flow)
            while True:
                try:
                    answer = await self._perform(effect, deadline)
                except ClientError as error:
                    effect = flow.throw(error)
                else:
                    effect = flow.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _perform(self, effect: flows.Effect, deadline: float) -> Any:
        if isinstance(effect, flows.InferAll):
            try:
                return await self._infer_all(effect.requests, deadline)
            except (UnknownModel, InvalidInput):
                self._models.clear()  # the models may have changed since we asked
                raise
        if isinstance(effect, flows.ReadMetrics):
            return await asyncio.to_thread(metrics.read, effect.address)
        if isinstance(effect, flows.Ask):
            return await self._ask(effect.question, "", deadline)
        if effect.model not in self._models:
            self._models[effect.model] = parse_model_info(await self._ask("config", effect.model, deadline))
        return self._models[effect.model]

    async def _ask(self, question: Any, model: str, deadline: float) -> Any:
        attempts = Attempts(self._retry, self._clock, deadline)
        while True:
            try:
                return await self._transport.ask(question, model, attempts.begin())
            except ClientError as error:
                await self._clock.sleep_async(attempts.wait_after(error, idempotent=True))

    def _attempts(self, request: InferRequest | None, deadline: float) -> Attempts:
        return Attempts(self._retry, self._clock, deadline, request, self._budget)

    async def _infer(self, request: InferRequest, deadline: float) -> InferReply:
        attempts = self._attempts(request, deadline)
        while True:
            try:
                reply = await self._one_reply(request, attempts.begin())
                attempts.end("completed", version=reply.version)
                return reply
            except ClientError as error:
                await self._clock.sleep_async(
                    attempts.wait_after(flows.located(error, request), idempotent=request.idempotent)
                )
            except asyncio.CancelledError:
                attempts.end("cancelled")
                raise

    async def _one_reply(self, request: InferRequest, timeout: float) -> InferReply:
        if not request.decoupled:
            return await self._transport.infer(request, timeout)
        replies = self._transport.stream(request, timeout)
        try:
            found = [reply async for reply in replies]
        finally:
            await replies.close()
        if found:
            return found[0]
        raise UnexpectedAnswer("the stream ended without an answer")

    async def _infer_all(self, requests: tuple[InferRequest, ...], deadline: float) -> list[InferReply]:
        if len(requests) == 1:
            return [await self._infer(requests[0], deadline)]
        gate = asyncio.Semaphore(STREAMS if requests[0].decoupled else IN_FLIGHT)

        async def one(request: InferRequest) -> InferReply:
            async with gate:
                return await self._infer(request, deadline)

        tasks = [asyncio.create_task(one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # without effect on those that are done
