"""Messages to a prompt by the checkpoint's own chat template, as Transformers renders it.

Templates come with checkpoints, so they run in a sandbox (runtime.template). The rendered text holds the
special tokens already: it is tokenized without adding any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from triton_repo.runtime.texts import MAX_CHARACTERS, BadRequest, decode_text

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1024
# Characters of a template's source; the longest known have 20,000.
MAX_TEMPLATE = 1 << 18


class TemplateRefused(Exception):
    """The checkpoint's chat template is no template that this runtime can render."""


class ChatTemplate:
    """A compiled template. Thread-safe after construction.

    `tokens`: what the template may name, such as bos_token and eos_token.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        from triton_repo.runtime.template import Environment

        if len(source) > MAX_TEMPLATE:
            raise TemplateRefused(
                f"the chat template has {len(source):,} characters, more than {MAX_TEMPLATE:,}"
            )
        self._environment = Environment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # Python's own compiler, too, has limits
            raise TemplateRefused(f"the chat template is no valid template: {str(error)[:200]}") from None
        self._source = source
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the assistant's next message.

        Raises BadRequest when the template refuses the messages (no system prompt, roles that must
        alternate), and where it takes too long or makes too much of them.
        """
        from jinja2 import TemplateError

        self._environment.start()
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
            said = self._without_texts(error, messages)
            raise BadRequest(f"the model's chat template refuses 'messages': {said}") from None
        except Exception as error:  # templates compute: anything may go wrong in them
            said = self._without_texts(error, messages)
            raise BadRequest(
                f"the model's chat template fails on 'messages': {type(error).__name__}: {said}"
            ) from None

    def _without_texts(self, error: Exception, messages: Sequence[Mapping[str, str]]) -> str:
        """What an error says, unless it has a word of a message that is not the template's own."""
        said = str(error)[:200]
        strange = [word for word in re.findall(r"\w+", said) if word not in self._source]
        if any(word in message["content"] for word in strange for message in messages):
            return f"{type(error).__name__}, which repeats a part of them"
        return said


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
