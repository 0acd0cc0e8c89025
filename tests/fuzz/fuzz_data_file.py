"""Calibration and evaluation data: read, or refused by file and line, and never by what stands there."""

from __future__ import annotations

import re

import draw

from build_engines.errors import DataError
from calibration.samples import load_conversations, load_groups, load_texts

_SUFFIXES = (".jsonl", ".csv", ".txt")
SEEDS = [
    b'\x00{"text": "The noodles were good.", "label": "positive"}\n{"text": "Cold soup."}\n',
    b'\x00{"query": "Is it good?", "passages": ["yes it is", "no"], "relevance": [1, 0]}\n',
    b'\x00{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}\n',
    b'\x01text,label\n"The noodles, they were\ngood.",positive\n',
    "\x02국수가 맛있어요\n\nThe second line\n".encode(),
]
WORDS = [
    *(
        b'"text"',
        b'"label"',
        b'"query"',
        b'"passages"',
        b'"relevance"',
        b'"messages"',
        b'"role"',
        b'"content"',
    ),
    *(
        b"\n",
        b"\r",
        b",",
        b'"',
        b'""',
        b"[",
        b"]",
        b"{",
        b"}",
        b"null",
        b"NaN",
        b"1e999",
        b"\xef\xbb\xbf",
        b"\x00",
    ),
    *(b"\\ud800", b"Secretwording of somebody", b"9" * 30, b"\xff", b"\xe2\x80\xa8", b"true", b"-1"),
]


def target(data: bytes) -> None:
    found = draw.Draw(data)
    suffix, content = found.choice(_SUFFIXES), found.rest()
    words = set(re.findall(r"\w{12,}", content.decode("utf-8", "replace")))
    with draw.folder() as folder:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        for load in (load_texts, load_groups, load_conversations):
            try:
                load(path, limit=3)
                load_texts(path, labels=["positive", "negative"])
            except DataError as error:
                assert "data" in str(error)
                assert not any(word in str(error) for word in words), str(error)
