"""Read texts out of a request and refuse bad ones with a message that names the position, never the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Beyond this a text is refused outright: reading it at all would hold up its neighbours.
MAX_CHARACTERS = 1_000_000
MAX_PASSAGES = 1024


class BadRequest(Exception):
    """The request cannot be answered as it is; the message goes to its sender."""


class EngineFailed(Exception):
    """The engine broke on a run; the requests whose texts were in it get this."""


def read_texts(values: npt.NDArray[Any], name: str) -> list[str]:
    """The texts of a BYTES tensor of shape [n, 1] (or [n]), in order. Raises BadRequest."""
    flat = values.reshape(-1)
    if flat.size == 0:
        raise BadRequest(f"'{name}' holds no text")
    single = flat.size == 1
    return [
        read_text(value, f"'{name}'" if single else f"'{name}' {position}")
        for position, value in enumerate(flat)
    ]


def read_text(value: Any, where: str) -> str:
    """One text: valid UTF-8, not blank, at most MAX_CHARACTERS. Raises BadRequest naming `where`."""
    text = decode_text(value, where)
    if not text or text.isspace():
        raise BadRequest(f"{where} is {'blank' if text else 'empty'}")
    return text


def decode_text(value: Any, where: str) -> str:
    """One text, blank or not: valid UTF-8, at most MAX_CHARACTERS. Raises BadRequest naming `where`."""
    raw = value if isinstance(value, bytes) else bytes(value)
    # UTF-8 needs at most four bytes per character, so this refuses without decoding.
    if len(raw) > 4 * MAX_CHARACTERS:
        raise BadRequest(f"{where} has {len(raw)} bytes; at most {MAX_CHARACTERS} characters are read")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"{where} is not valid UTF-8 (byte 0x{raw[error.start]:02x} at {error.start}: {error.reason})"
        ) from None
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(f"{where} has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    return text


def read_pairs(queries: npt.NDArray[Any], passages: npt.NDArray[Any]) -> tuple[list[str], list[list[str]]]:
    """Queries [b, 1] and their passages [b, p]; p is at least 1. Raises BadRequest."""
    texts = read_texts(queries, "query")
    table = np.atleast_2d(passages)
    if table.shape[0] != len(texts):
        raise BadRequest(f"{len(texts)} queries but {table.shape[0]} rows of passages")
    if table.shape[1] == 0:
        raise BadRequest("'passages' is empty: a query needs at least one passage")
    if table.size > MAX_PASSAGES:
        raise BadRequest(
            f"{table.size} passages in one request; at most {MAX_PASSAGES} (send several requests)"
        )
    return texts, [read_texts(row, "passages") for row in table]
