"""What each generating call does, in the form of flows: generators that yield the I/O they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import generate
from .codec import InferReply, InferRequest
from .errors import InvalidInput
from .flows import Flow, InferAll, Options, new_id, one_version, resolve
from .generate import GenerateOptions, Prompt
from .types import Generation


def split_options(
    given: GenerateOptions, kind: type[GenerateOptions] = GenerateOptions
) -> tuple[Options, dict[str, Any], float | None]:
    """Which variant answers, the parameters of the generation (None dropped), and the timeout."""
    known = kind.__annotations__
    for name in given:
        if name not in known:
            raise TypeError(f"unknown option {name}; known: {', '.join(known)}")
    rest = dict(given)
    timeout: Any = rest.pop("timeout", None)
    routing: dict[str, Any] = {name: rest.pop(name) for name in generate.ROUTING if name in rest}
    return Options(**routing), {name: value for name, value in rest.items() if value is not None}, timeout


def prompts(texts: Iterable[str], parameters: Mapping[str, Any]) -> list[Prompt]:
    """Each text, checked; InvalidInput names the one that is wrong."""
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
        raise InvalidInput(f"expected a prompt or a list of prompts, not {type(texts).__name__}")
    system, chat = parameters.get("system"), parameters.get("chat", False)
    if not isinstance(chat, bool):
        raise InvalidInput(f"chat must be True or False, not {chat!r}")
    return [
        generate.text_prompt(text, f"prompt {place}", system, chat=chat) for place, text in enumerate(texts)
    ]


def conversation(messages: object, parameters: Mapping[str, Any]) -> Prompt:
    return generate.chat_prompt(messages, parameters.get("system"))


def check(parameters: Mapping[str, Any]) -> None:
    """Raise InvalidInput for a parameter that is wrong; for calls that send later."""
    generate.parameters(parameters)


def complete(given: list[Prompt], options: Options, parameters: Mapping[str, Any]) -> Flow[list[Generation]]:
    """Every prompt's answer, in their order."""
    requests = yield from requests_for(given, options, parameters, stream=False)
    if not requests:
        return []
    replies = yield from one_version(requests, _infer)
    wanted = bool(parameters.get("logprobs"))
    return [generate.parse_generation(reply, logprobs=wanted) for reply in replies]


def _infer(requests: tuple[InferRequest, ...]) -> Flow[list[InferReply]]:
    replies: list[InferReply] = yield InferAll(requests)
    return replies


def requests_for(
    given: list[Prompt], options: Options, parameters: Mapping[str, Any], *, stream: bool
) -> Flow[tuple[InferRequest, ...]]:
    """One request for each prompt: they join and leave the server's running batch one by one."""
    tensors = generate.parameters(parameters)
    if not given:
        return ()
    info = yield from resolve("generate", options)
    base = options.request_id or new_id()
    return tuple(
        InferRequest(
            model=info.name,
            inputs=generate.request_inputs(prompt, tensors, stream=stream),
            outputs=generate.OUTPUTS,
            request_id=base if len(given) == 1 else f"{base}/{place}",
            task="generate",
            priority=options.priority,
            part="" if len(given) == 1 else f"prompt {place}",
            decoupled=True,
        )
        for place, prompt in enumerate(given)
    )
