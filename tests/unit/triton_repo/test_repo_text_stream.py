"""Streams of text: joined they are the tokenizer's own decoding, and no piece ends where it must not."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import llm_tokenizers
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_repo.runtime.clusters import LONGEST, settled
from triton_repo.runtime.detokenize import HELD_BYTES, detokenizer_factory
from triton_repo.runtime.text_stream import TextStream

KINDS = {
    "byte-level": llm_tokenizers.byte_level,
    "byte-fallback": llm_tokenizers.byte_fallback,
    "byte-fallback-no-strip": functools.partial(llm_tokenizers.byte_fallback, strip=False),
    "metaspace": llm_tokenizers.metaspace,
}
CHARACTERS = [
    *"abz 019#*\n.é",
    *"한가각ㄱ힣",
    *"\u1100\u1112\u1161\u11a8\u11ab",
    *"👍👨👩👧❤☀✊🏽🏿🏴🇰🇷🇺🇸1©",
    "\u200d",
    "\ufe0f",
    "\u20e3",
    "\u0301",
    "\u302e",
    "\U000e0067",
    "\U000e007f",
    "中",
]


@functools.cache
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()


@functools.cache
def factory(kind: str) -> Any:
    return detokenizer_factory(tokenizer(kind))


def stream(kind: str, ids: Sequence[int], stops: Sequence[str] = ()) -> list[str]:
    text = TextStream(factory(kind)(), stops)
    pieces = [text.push(token) for token in ids]
    return [*pieces, text.flush()]


def protected(cluster: str) -> bool:
    """Whether a grapheme cluster is a Hangul syllable or an emoji."""
    return len(cluster) > 1 and bool(
        regex.match(
            r"[\p{Hangul_Syllable_Type=L}\p{Hangul_Syllable_Type=V}\p{Hangul_Syllable_Type=T}]", cluster
        )
        or regex.match(r"[\p{Hangul_Syllable_Type=LV}\p{Hangul_Syllable_Type=LVT}]", cluster)
        or regex.match(r"\p{Extended_Pictographic}|\p{Regional_Indicator}|[0-9#*]", cluster)
    )


def check_borders(pieces: Sequence[str]) -> None:
    """No piece ends inside of a cluster of the whole text that must not be cut."""
    borders, place = set(), 0
    for piece in pieces[:-1]:
        place += len(piece)
        borders.add(place)
    text, start = "".join(pieces), 0
    for cluster in regex.findall(r"\X", text):
        inside = borders & set(range(start + 1, start + len(cluster)))
        assert not inside or not protected(cluster), (cluster, pieces)
        start += len(cluster)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_random_tokens_stream_as_they_decode(kind: str, data: st.DataObject) -> None:
    size = tokenizer(kind).get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=40))
    pieces = stream(kind, ids)
    assert "".join(pieces) == tokenizer(kind).decode(ids)
    check_borders(pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from(CHARACTERS), max_size=24))
def test_syllables_and_emoji_arrive_whole(kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text, add_special_tokens=False).ids
    pieces = stream(kind, ids)
    assert "".join(pieces) == tokenizer(kind).decode(ids)
    check_borders(pieces)


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.sampled_from(CHARACTERS), max_size=20), cut=st.integers(0, 20))
def test_a_cut_is_no_later_than_the_last_open_cluster(text: str, cut: int) -> None:
    """Cut anywhere: what counts as settled stays whole whatever follows."""
    safe = settled(text[:cut])
    assert safe <= len(text[:cut])
    check_borders([text[:safe], text[safe:]])


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_text_arrives_soon(kind: str) -> None:
    """Nothing waits longer than for the next character, in either script."""
    for sentence in llm_tokenizers.CORPUS[:3]:
        ids = tokenizer(kind).encode(sentence, add_special_tokens=False).ids
        pieces, shown = stream(kind, ids), ""
        for position, piece in enumerate(pieces[:-1]):
            shown += piece
            so_far = tokenizer(kind).decode(ids[: position + 1]).rstrip("�")
            run = 0
            while run <= position and tokenizer(kind).id_to_token(ids[position - run]).startswith("<0x"):
                run += 1
            assert len(shown) >= len(so_far) - 1 - run


def test_every_token_of_a_real_sentence_alone() -> None:
    ids = tokenizer("byte-level").encode("맛있어요👍🏽!", add_special_tokens=False).ids
    pieces = [piece for piece in stream("byte-level", ids) if piece]
    assert "".join(pieces) == "맛있어요👍🏽!"
    assert len(pieces) >= 3
    assert any("👍🏽" in piece for piece in pieces)


def test_special_tokens_are_left_out_and_others_kept() -> None:
    for kind in KINDS:
        one = tokenizer(kind)
        ids = [1, *one.encode("good", add_special_tokens=False).ids, one.token_to_id("<|tool|>"), 2]
        text = "".join(stream(kind, ids))
        assert text == one.decode(ids)
        assert text.split() in (["good<|tool|>"], ["good", "<|tool|>"])


def test_bytes_are_not_held_for_ever() -> None:
    """A run of byte tokens is out of the tokenizer's hands only at its end: held, but not without a limit."""
    text = "핥" * 60
    ids = [3 + byte for byte in text.encode()]
    pieces = stream("byte-fallback", ids)
    assert "".join(pieces) == text
    first = next(place for place, piece in enumerate(pieces) if piece)
    assert first <= HELD_BYTES + 3
    assert len([piece for piece in pieces if piece]) > 30


def test_a_cluster_is_not_held_for_ever() -> None:
    text = "👍" + "\u200d👍" * 3 * LONGEST
    ids = tokenizer("byte-level").encode(text, add_special_tokens=False).ids
    pieces = stream("byte-level", ids)
    assert "".join(pieces) == text
    assert pieces.index(next(piece for piece in pieces if piece)) < len(pieces) // 2


def stopped(kind: str, text: str, stops: Sequence[str]) -> tuple[str, bool]:
    one = TextStream(factory(kind)(), stops)
    out = ""
    for token in tokenizer(kind).encode(text, add_special_tokens=False).ids:
        piece = one.push(token)
        out += piece
        assert not any(stop in out for stop in stops)
        if one.stopped:
            break
    return (out, True) if one.stopped else (out + one.flush(), False)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize(
    ("text", "stops", "expected", "found"),
    [
        ("국수가 정말 맛있어요", ["정말"], "국수가 ", True),
        ("The noodles were good", ["dles w"], "The noo", True),
        ("ab\n\n### User: hi", ["\n### User:"], "ab\n", True),
        ("ababac", ["abac"], "ab", True),
        ("aaab", ["aab"], "a", True),
        ("abcabd", ["abd", "bca"], "a", True),
        ("xhello", ["hello", "ello"], "x", True),
        ("stop", ["stop"], "", True),
        ("sto", ["stop"], "sto", False),
        ("정말👍🏽!", ["👍🏽"], "정말", True),
        ("nothing here", ["absent", "nowhere"], "nothing here", False),
    ],
)
def test_stop_strings(kind: str, text: str, stops: list[str], expected: str, found: bool) -> None:
    assert stopped(kind, text, stops) == (expected, found)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab 가", max_size=30),
    stops=st.lists(st.text("ab 가", min_size=1, max_size=5), max_size=3),
    kind=st.sampled_from(["byte-level", "byte-fallback"]),
)
def test_stop_strings_wherever_tokens_end(text: str, stops: list[str], kind: str) -> None:
    whole = tokenizer(kind).decode(tokenizer(kind).encode(text, add_special_tokens=False).ids)
    ends = [(whole.index(stop) + len(stop), -len(stop)) for stop in stops if stop in whole]
    out, found = stopped(kind, text, stops)
    assert found == bool(ends)
    assert out == (whole[: sum(min(ends))] if ends else whole)


def test_nothing_follows_a_stop() -> None:
    one = TextStream(factory("byte-level")(), ["b"])
    ids = tokenizer("byte-level").encode("abc", add_special_tokens=False).ids
    pieces = [one.push(token) for token in ids] + [one.flush()]
    assert "".join(pieces) == "a"


def test_many_long_stop_strings_cost_little() -> None:
    """The worst that is allowed, on a text that almost matches all the time: one look per character."""
    steps = 0
    one = TextStream(factory("byte-level")(), ["a" * 255 + str(number % 10) for number in range(16)])
    token = tokenizer("byte-level").encode("a", add_special_tokens=False).ids[0]
    for _ in range(600):
        steps += len(one.push(token))
    assert steps == 600 - 255


def test_the_same_pieces_whatever_was_streamed_before() -> None:
    """Streams share what they know of tokens, nothing else."""
    ids = tokenizer("byte-fallback").encode("국수가 정말 좋아요", add_special_tokens=False).ids
    first = stream("byte-fallback", ids)
    shuffled = random.Random(0).sample(range(tokenizer("byte-fallback").get_vocab_size()), 200)
    stream("byte-fallback", shuffled)
    assert stream("byte-fallback", ids) == first
