"""Tokens to text one at a time: the pieces of a stream, joined, are the whole; nothing is taken back."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import draw

from triton_repo.runtime.clusters import LONGEST, settled
from triton_repo.runtime.detokenize import detokenizer_factory
from triton_repo.runtime.text_stream import TextStream

sys.path.append(str(Path(__file__).parents[1] / "unit" / "triton_repo"))

_KINDS = ("byte_level", "byte_fallback", "unstripped", "metaspace")
SEEDS = [bytes([kind, 2, 3]) + bytes(range(kind, 250, 3)) for kind in range(4)]
SEEDS += [b"\x00\x00" + "각👍🏽👨‍👩‍👧🇰🇷1️⃣".encode(), b"\x01\x01\x02\x00\x00\x00ab" + bytes(range(60)) * 2]
WORDS = [
    text.encode()
    for text in (
        "각",
        "ᄀ",
        "ᅡ",
        "ᆨ",
        "👍",
        "🏽",
        "\u200d",
        "\ufe0f",
        "🇰",
        "🇷",
        "\u20e3",
        "1",
        "\U000e0067",
        "\u0301",
    )
]


def target(data: bytes) -> None:
    found = draw.Draw(data)
    tokenizer, detokenizer = _tokenizer(found.choice(_KINDS))
    stops = [text[:20] for text in (found.text() for _ in range(found.byte() % 3)) if text]
    rest = found.rest()
    _check_clusters(rest.decode("utf-8", "replace"))
    size = tokenizer.get_vocab_size()
    tokens = [int.from_bytes(rest[place : place + 2], "big") % size for place in range(0, len(rest) - 1, 2)]
    tokens = tokens[:200]
    whole = tokenizer.decode(tokens)
    stream = TextStream(detokenizer())
    assert "".join([*(stream.push(token) for token in tokens), stream.flush()]) == whole
    stopped = TextStream(detokenizer(), stops)
    pieces = [stopped.push(token) for token in tokens]
    text = "".join([*pieces, stopped.flush()])
    if stopped.stopped:
        assert not any(stop in text for stop in stops)
    else:
        assert text == whole
        assert not any(stop in whole for stop in stops)


def _check_clusters(text: str) -> None:
    """Given out piece by piece, a text is whole, and little of it ever waits."""
    held, given = "", ""
    for character in text[:500]:
        held += character
        cut = settled(held)
        assert 0 <= cut <= len(held)
        assert len(held) - cut <= LONGEST
        given, held = given + held[:cut], held[cut:]
    assert given + held == text[:500]


@cache
def _tokenizer(kind: str) -> tuple[Any, Any]:
    import llm_tokenizers

    made = {
        "byte_level": llm_tokenizers.byte_level,
        "byte_fallback": llm_tokenizers.byte_fallback,
        "unstripped": lambda: llm_tokenizers.byte_fallback(strip=False),
        "metaspace": llm_tokenizers.metaspace,
    }[kind]()
    return made, detokenizer_factory(made)
