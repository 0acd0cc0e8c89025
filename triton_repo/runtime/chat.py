"""Messages to a prompt by the checkpoint's own chat template, as Transformers renders it.

Templates come with checkpoints, so they run in Jinja's immutable sandbox. The rendered text holds the special
tokens already: it is tokenized without adding any.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from triton_repo.runtime.texts import MAX_CHARACTERS, BadRequest, decode_text

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1024


class TemplateRefused(Exception):
    """The checkpoint's chat template is no template that this runtime can render."""


class ChatTemplate:
    """A compiled template. Thread-safe after construction.

    `tokens`: what the template may name, such as bos_token and eos_token.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError

        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise TemplateRefused(f"the chat template is no valid template: {error}") from None
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the assistant's next message.

        Raises BadRequest when the template refuses the messages (no system prompt, roles that must
        alternate).
        """
        from jinja2 import TemplateError

        try:
            prompt: str = self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
            return prompt
        except TemplateError as error:
            raise BadRequest(f"the model's chat template refuses 'messages': {error}") from None
        except Exception as error:  # templates compute: anything may go wrong in them
            raise BadRequest(
                f"the model's chat template fails on 'messages': {type(error).__name__}: {error}"
            ) from None


def read_messages(value: Any) -> list[dict[str, str]]:
    """Messages from JSON (bytes or str) or from a list of {"role", "content"}; at most one system message,
    first.

    Raises BadRequest that names the message and what is wrong with it, never its text.
    """
    if isinstance(value, bytes | str):
        value = _parsed(value)
    if not isinstance(value, list | tuple):
        raise BadRequest(f"'messages' is {_kind(value)}, not a list of messages")
    if not value:
        raise BadRequest("'messages' is empty; it needs at least one message")
    if len(value) > MAX_MESSAGES:
        raise BadRequest(f"'messages' has {len(value)} messages; at most {MAX_MESSAGES} are read")
    messages = [_message(entry, f"'messages' {position}") for position, entry in enumerate(value)]
    systems = [position for position, message in enumerate(messages) if message["role"] == "system"]
    if len(systems) > 1:
        raise BadRequest(f"'messages' has {len(systems)} system messages; put them into one, at the start")
    if systems and systems[0]:
        raise BadRequest(f"'messages' {systems[0]} is the system message; it must be the first")
    total = sum(len(message["content"]) for message in messages)
    if total > MAX_CHARACTERS:
        raise BadRequest(f"'messages' have {total} characters; at most {MAX_CHARACTERS} are read")
    return messages


def _parsed(value: bytes | str) -> Any:
    try:
        return json.loads(decode_text(value, "'messages'") if isinstance(value, bytes) else value)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"'messages' is not JSON: {error}") from None


def _message(entry: Any, where: str) -> dict[str, str]:
    if not isinstance(entry, Mapping):
        raise BadRequest(f"{where} is {_kind(entry)}, not an object with 'role' and 'content'")
    for name in ("role", "content"):
        if name not in entry:
            raise BadRequest(f"{where} has no '{name}'")
    unknown = [str(name) for name in entry if name not in ("role", "content")]
    if unknown:
        raise BadRequest(f"{where} has the unknown field {unknown[0]!r:.60}; known are 'role' and 'content'")
    role, content = entry["role"], entry["content"]
    if role not in ROLES:
        raise BadRequest(f"{where} has the unknown role {role!r:.40}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRequest(f"{where}: 'content' is {_kind(content)}, not a text")
    return {"role": str(role), "content": checked_unicode(content, where)}


def checked_unicode(text: str, where: str) -> str:
    """`text`, unless it holds half of a surrogate pair, which JSON can say and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise BadRequest(
            f"{where} is not valid Unicode (lone surrogate U+{code:04X} at {error.start})"
        ) from None
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    )


def _environment() -> Any:
    """Jinja as Transformers sets it up: its block rules, `tojson` without HTML escapes, and two functions."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant wrote, for training; here its content counts."""

        tags = frozenset(("generation",))  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's own takes any attribute, also those that Python gives a meaning to."""

        def __init__(*values: Any, **named: Any) -> None:
            self, *rest = values
            jinja2.utils.Namespace.__init__(self)
            for name, value in dict(*rest, **named).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template cannot set {name!r}")
            super().__setitem__(name, value)

    def new_dict(*values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["dict"] = new_dict
    environment.globals["namespace"] = Namespace
    return environment
