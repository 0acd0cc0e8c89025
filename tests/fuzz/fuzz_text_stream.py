"""Tokens to text one at a time: the pieces of a stream, joined, are the whole; nothing is taken back."""

from __future__ import annotations

from functools import cache
from typing import Any

import draw

from triton_repo.runtime.clusters import LONGEST, settled
from triton_repo.runtime.detokenize import HELD_BYTES, detokenizer_factory
from triton_repo.runtime.text_stream import TextStream

SPECIAL = ("<unk>", "<s>", "</s>")
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
    tokens = _with_short_runs(tokenizer, tokens[:200])
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


def _with_short_runs(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Without bytes that follow HELD_BYTES others: those are given out before it is known what they are."""
    kept, run = [], 0
    for token in tokens:
        name = tokenizer.id_to_token(token)
        is_byte, is_special = name.startswith("<0x"), name in SPECIAL
        run = run + 1 if is_byte else run if is_special else 0
        if not is_byte or run <= HELD_BYTES:
            kept.append(token)
    return kept


@cache
def _tokenizer(kind: str) -> tuple[Any, Any]:
    """The same in every process, so that a finding can be run again."""
    made = _byte_level() if kind == "byte_level" else _byte_fallback(kind)
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens(["<|tool|>", "<마침 표>"])
    return made, detokenizer_factory(made)


def _byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *alphabet, *(a + b for a in alphabet[::7] for b in alphabet[::11])]
    tokenizer = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_fallback(kind: str) -> Any:
    """Llama 2's decoder, Gemma's without its last step, or one that is followed by decoding everything."""
    from tokenizers import Tokenizer, decoders, models

    pieces = [
        "▁",
        "▁▁",
        "▁the",
        "국",
        "수",
        "국수",
        "o",
        "x",
        "👍",
        "\u200d",
        "🏽",
        "ᄀ",
        "ᅡ",
        "1",
        "\u20e3",
        ".",
    ]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    model = models.BPE({name: place for place, name in enumerate(names)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = {
        "byte_fallback": decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)]),
        "unstripped": decoders.Sequence(steps),
        "metaspace": decoders.Metaspace(),
    }[kind]
    return tokenizer
