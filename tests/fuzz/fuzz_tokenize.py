"""A text cut before it is tokenized gives the tokens that the whole text begins with."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import draw

from triton_repo.runtime.tokenization import TextTokenizer, longest_first

MAX_LENGTH = 8
# Beyond what is cut at first, below what is ever read: more would only be slow.
_LONGEST = 1 << 15
_KINDS = ("wordpiece", "byte_level", "unigram")
SEEDS = [
    b"\x00\x40\x00\x00\x00" + b"\x06\x00\x00\x00noodle" * 3,
    b"\x01\x90\x01\x00\x00" + "\x09\x00\x00\x00국수는".encode() + "\x07\x00\x00\x00 맛있".encode(),
    b"\x02\xff\x03\x00\x00" + "\x03\x00\x00\x00ㅋ".encode() * 2,
    b"\x00\x80\x00\x00\x00" + b"\x03\x00\x00\x00\xe3\x80\x80" + b"\x04\x00\x00\x00e\xcc\x81\xcc" * 2,
]
_WORDS = (
    "ㅋ",
    "국수",
    "  ",
    "\n",
    "\t",
    "\u3000",
    "\x1c",
    "\u200b",
    "e\u0301",
    "漢字",
    "👍🏽",
    "##",
    "▁",
    "aaaa",
)
WORDS = [word.encode() for word in _WORDS]


def target(data: bytes) -> None:
    found = draw.Draw(data)
    ours, whole = _tokenizer(found.choice(_KINDS))
    # Long texts out of few bytes: pieces, each many times.
    times = found.integer(1, 1200)
    text = "".join(found.text() * (times if place % 2 == 0 else 1) for place in range(4))[:_LONGEST]
    expected = whole.encode(text, add_special_tokens=False).ids
    (ids, complete), (short, _) = ours.content([text, "a"])
    assert short == whole.encode("a", add_special_tokens=False).ids
    assert complete or len(expected) < MAX_LENGTH + 128
    assert ids[:MAX_LENGTH] == expected[:MAX_LENGTH], (len(text), ids[:MAX_LENGTH], expected[:MAX_LENGTH])
    row = ours.singles([text])[0]
    assert len(row.ids) == len(row.types) <= MAX_LENGTH
    first, second = found.byte(), found.byte()
    kept = longest_first(first, second, MAX_LENGTH)
    assert first + second <= MAX_LENGTH or sum(kept) == MAX_LENGTH


@cache
def _tokenizer(kind: str) -> tuple[TextTokenizer, Any]:
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        {"wordpiece": _wordpiece, "byte_level": _byte_level, "unigram": _unigram}[kind]().save(str(path))
        return TextTokenizer(path, max_length=MAX_LENGTH), Tokenizer.from_file(str(path))


_CORPUS = ["국수가 정말 맛있어요 ㅋㅋㅋㅋ ㅎㅎ", "the noodles were good", "aaaa bbbb abab", "漢字テキスト"]


def _wordpiece() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [
        "[PAD]",
        "[UNK]",
        "noodle",
        "ㅋ",
        "##ㅋ",
        "국",
        "##수",
        *letters,
        *(f"##{x}" for x in letters),
        ".",
    ]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _byte_level() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _unigram() -> Any:
    """As sentencepiece has it: XLM-RoBERTa's kind."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("ㅋ", -6.0),
        ("ㅋㅋㅋ", -6.5),
        ("국수", -5.0),
        ("국", -7.0),
        ("수", -7.0),
    ]
    pieces += [(letter, -5.0) for letter in "abdelnos."] + [("aa", -5.5), ("aaa", -6.0), ("▁noodle", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer
