"""One line in Triton's log for what happened to a request, and that line read again.

    onecard request_id=r-17 model=sentiment event=rejected reason=queue_full

A model file passes `line(...)` to `pb_utils.Logger`; `triton-repo serve --log-format json` reads it with
`parse`. No text of a user gets in: a reason is one of our own words, and of a request's id, which is the
client's to choose, 64 printable characters are kept.
"""

from __future__ import annotations

import re

_FIELDS = ("request_id", "model", "event", "reason")
_MOST_CHARACTERS = 64
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
_LINE = re.compile(r"onecard((?: (?:" + "|".join(_FIELDS) + r")=\S+)+)")


def line(*, model: str, event: str, reason: str, request_id: str = "") -> str:
    """The line for one request. `event` and `reason` are words such as `rejected` and `queue_full`; anything
    else becomes `other`, so that a message passed by mistake is not written down. Never raises."""
    values = {
        "request_id": printable(request_id),
        "model": printable(model),
        "event": _word(event),
        "reason": _word(reason),
    }
    return "onecard " + " ".join(f"{name}={value}" for name, value in values.items() if value)


def parse(message: str) -> dict[str, str] | None:
    """The fields of a line that `line` made; None for any other message."""
    match = _LINE.fullmatch(message)
    if match is None:
        return None
    return dict(pair.split("=", 1) for pair in match[1].split())


def printable(text: str) -> str:
    """At most 64 characters of it, `_` in the place of white space and what cannot be printed."""
    return "".join(_character(character) for character in str(text)[:_MOST_CHARACTERS])


def _character(character: str) -> str:
    return character if character.isprintable() and not character.isspace() else "_"


def _word(text: str) -> str:
    return text if _WORD.fullmatch(text) else "other"
