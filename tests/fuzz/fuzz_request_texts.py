"""An encoder's request: texts, or queries and their passages, as Triton's BYTES tensors."""

from __future__ import annotations

from typing import Any

import draw
import numpy as np

from triton_repo.runtime.texts import MAX_PASSAGES, BadRequest, read_pairs, read_texts

SEEDS = [
    b"\x01\x00" + b"\x05\x00\x00\x00hello",
    b"\x03\x00" + b"\x02\x00\x00\x00ab\x01\x00\x00\x00 " + "국수".encode(),
    b"\x04\x02" + b"\x06\x00\x00\x00\xea\xb5\xad\xec\x88\x98" * 8,
]
WORDS = [
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\x00",
    b"\xe2\x80\x83",
    b"\xef\xbf\xbd",
    b" \t\n",
    b"\x01\x00\x00\x00",
]


def target(data: bytes) -> None:
    found = draw.Draw(data)
    rows, columns = found.byte() % 6, found.byte() % 4
    if found.byte() == 255:
        columns = MAX_PASSAGES + 1
    values = _texts(found, (rows, 1))
    _checked(lambda: read_texts(values, "text"), data)
    passages = _texts(found, (found.choice([rows, rows + 1]), columns))
    _checked(lambda: read_pairs(_texts(found, (rows, 1)), passages), data)


def _texts(found: draw.Draw, shape: tuple[int, int]) -> Any:
    return np.array([found.part() for _ in range(shape[0] * shape[1])] + [None], object)[:-1].reshape(shape)


def _checked(read: Any, data: bytes) -> None:
    try:
        answer = read()
    except BadRequest as error:
        # What is refused is named by its place, never by its text.
        assert len(str(error)) < 200
        return
    texts = answer if isinstance(answer, list) else [*answer[0], *(text for row in answer[1] for text in row)]
    assert all(text.strip() and text.encode() in data for text in texts)
