"""Tokenization equals the tokenizer's own, for every length, however a long text is cut on the way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from triton_repo.runtime import tokenization
from triton_repo.runtime.tokenization import TextTokenizer, TokenizerRefused, bounded, longest_first

MAX_LENGTH = 24
PIECES = [
    "the",
    "noodles",
    "reviews",
    "맛있어요",
    "국수",
    "漢字",
    "Ünï",
    "👍🏽",
    ".",
    "x" * 130,
    "\u200b",
    "e\u0301",
]
GAPS = [" ", "  ", "\n", "\t", "", " \u3000", "\x1c"]
texts = st.lists(
    st.tuples(st.sampled_from(PIECES) | st.text(max_size=8), st.sampled_from(GAPS)), max_size=60
).map(lambda parts: "".join(word + gap for word, gap in parts))


def reference(path: Path, *text: str, max_length: int = MAX_LENGTH) -> Any:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer.encode(*text)


@given(text=texts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_single_texts_equal_the_tokenizer(tokenizer_file: Path, text: str) -> None:
    row = TextTokenizer(tokenizer_file, max_length=MAX_LENGTH).singles([text])[0]
    expected = reference(tokenizer_file, text)
    assert row.ids == expected.ids
    assert row.types == expected.type_ids
    assert row.truncated == bool(expected.overflowing)


@given(query=texts, passage=texts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_pairs_equal_the_tokenizer(tokenizer_file: Path, query: str, passage: str) -> None:
    row = TextTokenizer(tokenizer_file, max_length=MAX_LENGTH).pairs([(query, [passage])])[0][0]
    expected = reference(tokenizer_file, query, passage)
    assert row.ids == expected.ids
    assert row.types == expected.type_ids
    assert row.truncated == bool(expected.overflowing)


@given(text=texts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
def test_cutting_a_long_text_first_changes_nothing(tokenizer_file: Path, text: str) -> None:
    """With limits so small that every text is cut and tried again."""
    long = text * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_CHARACTERS_PER_TOKEN", 1)
        patch.setattr(tokenization, "_GROWTH", 2)
        row = TextTokenizer(tokenizer_file, max_length=MAX_LENGTH).singles([long])[0]
    expected = reference(tokenizer_file, long)
    assert row.ids == expected.ids
    assert row.truncated == bool(expected.overflowing)


@given(first=st.integers(0, 60), second=st.integers(0, 60), room=st.integers(1, 40))
def test_longest_first_fills_the_room(first: int, second: int, room: int) -> None:
    if first + second <= room:
        return
    kept_first, kept_second = longest_first(first, second, room)
    assert kept_first + kept_second == room
    assert kept_first <= first
    assert kept_second <= second


@given(text=st.text(), limit=st.integers(2, 30))
def test_a_cut_text_is_a_prefix_within_the_limit(text: str, limit: int) -> None:
    cut = bounded(text, limit)
    assert text.startswith(cut)
    # Longer only where there is no white space to cut at.
    assert len(cut) <= limit or not any(space in text[limit // 2 : len(cut)] for space in " \t\n\r")


def test_a_cut_falls_on_white_space() -> None:
    assert bounded("aaaa bbbb cccc", 12) == "aaaa bbbb"
    assert bounded("a" * 40 + " b", 12) == "a" * 40
    assert bounded("a" * 40, 12) == "a" * 40
    assert len(bounded("a" * 900_000, 12)) == tokenization.READ_CHARACTERS


def test_a_long_word_has_the_tokens_of_the_whole_of_it(tmp_path: Path) -> None:
    """Found by fuzzing: cut inside, "aaa..." was divided into other tokens from its start."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("a", -5.0), ("aa", -5.5), ("aaa", -6.0)]
    model = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json", max_length=MAX_LENGTH)
    for length in (2301, 2302, 2303, 5000):
        text = "a" * length
        assert tokenizer.singles([text])[0].ids == model.encode(text).ids[:MAX_LENGTH]


@pytest.mark.parametrize(
    "text",
    [
        "word " * 20_000,
        "a" * 100_000,
        "안녕" * 50_000,
        "漢字" * 50_000,
        "\u200b" * 100_000,
        "a" + " " * 99_998 + "b",
    ],
    ids=["words", "one-word", "hangul", "han", "zero-width", "blanks"],
)
def test_a_hundred_thousand_characters_are_quick(wordpiece_file: Path, text: str) -> None:
    tokenizer = TextTokenizer(wordpiece_file, max_length=64)
    started = time.process_time()
    row = tokenizer.singles([text])[0]
    assert time.process_time() - started < 1.0
    expected = reference(wordpiece_file, text, max_length=64)
    assert (row.ids, row.truncated) == (expected.ids, bool(expected.overflowing))


def test_what_is_never_read_counts_as_truncated(wordpiece_file: Path) -> None:
    """A text that stays one unknown token for as long as it is read: answered, and flagged."""
    row = TextTokenizer(wordpiece_file, max_length=64).singles(["a" * 900_000])[0]
    assert row.ids == [2, 1, 3]
    assert row.truncated


def test_a_query_is_tokenized_once_for_all_its_passages(wordpiece_file: Path) -> None:
    tokenizer = TextTokenizer(wordpiece_file, max_length=MAX_LENGTH)
    calls: list[list[str]] = []
    inner = tokenizer._tokenizer

    class Spy:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            calls.append(texts)
            return inner.encode_batch_fast(texts, **options)

    tokenizer._tokenizer = Spy()
    rows = tokenizer.pairs([("good", ["bad", "the noodles"]), ("review", ["x"])])
    assert [len(group) for group in rows] == [2, 1]
    assert calls == [["good", "bad", "the noodles", "review", "x"]]


def test_a_broken_file_and_a_length_without_room_are_refused(tmp_path: Path, wordpiece_file: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(TokenizerRefused, match=r"tokenizer\.json: not a tokenizer file"):
        TextTokenizer(path, max_length=8)
    with pytest.raises(TokenizerRefused, match="no room for text in 3 tokens"):
        TextTokenizer(wordpiece_file, max_length=3)
