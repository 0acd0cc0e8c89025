"""Batches of requests: the answers, what is refused and in which words, and that neighbours never notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repo_fakes import HandEngine, expected_embedding

from triton_repo.runtime import texts as texts_module
from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.service import Answer, EncoderService
from triton_repo.runtime.texts import BadRequest, EngineFailed
from triton_repo.runtime.tokenization import TextTokenizer


def service(path: Path, task: str, **serving: Any) -> EncoderService:
    tokenizer = TextTokenizer(path, max_length=16)
    return EncoderService(Encoder(HandEngine(task, **serving), tokenizer, overhead=10))


def request(*values: str | bytes) -> dict[str, Any]:
    raw = [value if isinstance(value, bytes) else value.encode() for value in values]
    return {"text": np.array(raw, dtype=object).reshape(-1, 1)}


def ranking(query: str | bytes, *passages: str | bytes) -> dict[str, Any]:
    raw = [value if isinstance(value, bytes) else value.encode() for value in passages]
    return {
        "query": np.array([[query if isinstance(query, bytes) else query.encode()]], dtype=object),
        "passages": np.array([raw], dtype=object).reshape(1, -1),
    }


def refusal(answer: Answer) -> str:
    assert isinstance(answer, BadRequest)
    return str(answer)


def test_embeddings_come_back_to_the_request_they_belong_to(wordpiece_file: Path) -> None:
    texts = [
        "good",
        "the noodles were good " * 2,
        "bad reviews",
        "a",
        "the the the the",
        "good noodles",
        "b c",
    ]
    own = service(wordpiece_file, "embed")
    answers = own.answer([request(*texts[:3]), request(texts[3]), request(*texts[4:])])
    got = np.concatenate([answer["embedding"] for answer in answers if isinstance(answer, dict)])
    rows = own.encoder.tokenizer.singles(texts)
    assert got.tolist() == [expected_embedding(row.ids) for row in rows]
    assert own.encoder.tokens == sum(len(row.ids) for row in rows)
    engine = own.encoder.engine
    assert isinstance(engine, HandEngine)
    assert max(batch for batch, _ in engine.runs) <= 4
    assert sum(batch * width for batch, width in engine.runs) == own.encoder.tokens + own.encoder.padding


def test_labels_are_sorted_by_score(wordpiece_file: Path) -> None:
    answer = service(wordpiece_file, "classify").answer([request("good", "the noodles")])[0]
    assert isinstance(answer, dict)
    assert answer["scores"].shape == answer["labels"].shape == (2, 3)
    assert (np.diff(answer["scores"], axis=1) <= 0).all()
    names = {b"negative": 7, b"neutral": 5, b"positive": 3}
    totals = [
        sum(row.ids) for row in TextTokenizer(wordpiece_file, max_length=16).singles(["good", "the noodles"])
    ]
    for labels, scores, total in zip(answer["labels"], answer["scores"], totals, strict=True):
        assert {label: total % names[label] for label in labels} == dict(zip(labels, scores, strict=True))


def test_rerank_keeps_the_order_of_its_passages(wordpiece_file: Path) -> None:
    own = service(wordpiece_file, "rerank")
    answers = own.answer([ranking("good", "bad", "the noodles were good", "a"), ranking("review", "the")])
    pairs = own.encoder.tokenizer.pairs(
        [("good", ["bad", "the noodles were good", "a"]), ("review", ["the"])]
    )
    for answer, rows in zip(answers, pairs, strict=True):
        assert isinstance(answer, dict)
        expected = [sum(i for i, segment in zip(row.ids, row.types, strict=True) if segment) for row in rows]
        assert answer["scores"].tolist() == [expected]
        assert answer["truncated"].tolist() == [[False] * len(rows)]


BAD_TEXTS = [
    (b"", "'text' is empty"),
    (b" \n\t ", "'text' is blank"),
    ("\u3000".encode(), "'text' is blank"),
    (b"ab\xff\xfe", "'text' is not valid UTF-8 (byte 0xff at 2: invalid start byte)"),
    ("맛".encode()[:2], "'text' is not valid UTF-8 (byte 0xeb at 0: unexpected end of data)"),
    (b"a" * (texts_module.MAX_CHARACTERS + 1), "'text' has 1000001 characters; at most 1000000 are read"),
    (
        b"a" * (4 * texts_module.MAX_CHARACTERS + 1),
        "'text' has 4000001 bytes; at most 1000000 characters are read",
    ),
]


@pytest.mark.parametrize(("raw", "message"), BAD_TEXTS, ids=[message[:40] for _, message in BAD_TEXTS])
def test_a_bad_text_fails_its_own_request_only(wordpiece_file: Path, raw: bytes, message: str) -> None:
    own = service(wordpiece_file, "embed")
    good = own.answer([request("the noodles")])[0]
    answers = own.answer([request("the noodles"), request(raw), request("the noodles")])
    assert refusal(answers[1]) == message
    assert isinstance(good, dict)
    for answer in (answers[0], answers[2]):
        assert isinstance(answer, dict)
        assert answer["embedding"].tolist() == good["embedding"].tolist()


def test_the_position_of_a_bad_text_is_named(wordpiece_file: Path) -> None:
    own = service(wordpiece_file, "embed")
    assert refusal(own.answer([request("good", "bad", "")])[0]) == "'text' 2 is empty"


def test_bad_rankings_are_refused(wordpiece_file: Path) -> None:
    own = service(wordpiece_file, "rerank")
    many = ranking("good", *["bad"] * (texts_module.MAX_PASSAGES + 1))
    uneven = {**ranking("good", "a"), "passages": np.array([[b"a"], [b"b"]], dtype=object)}
    requests = [
        ranking("good"),
        ranking("", "bad"),
        ranking("good", "bad", " "),
        many,
        uneven,
        ranking("a", "b"),
    ]
    answers = own.answer(requests)
    assert refusal(answers[0]) == "'passages' is empty: a query needs at least one passage"
    assert refusal(answers[1]) == "'query' is empty"
    assert refusal(answers[2]) == "'passages' 1 is blank"
    assert refusal(answers[3]) == "1025 passages in one request; at most 1024 (send several requests)"
    assert refusal(answers[4]) == "1 queries but 2 rows of passages"
    assert isinstance(answers[5], dict)


def test_too_long_is_truncated_with_a_flag_or_refused(wordpiece_file: Path) -> None:
    long = "good " * 100
    truncating, refusing = (service(wordpiece_file, "embed", overflow=o) for o in ("truncate", "refuse"))
    answer = truncating.answer([request("good", long)])[0]
    assert isinstance(answer, dict)
    assert answer["truncated"].tolist() == [[False], [True]]
    assert answer["embedding"][1][1] == 16
    assert truncating.truncated == 1
    answers = refusing.answer([request("good"), request("good", long), request(long)])
    assert isinstance(answers[0], dict)
    assert refusal(answers[1]).startswith("text 1 has more than 16 tokens")
    assert refusal(answers[2]).startswith("the text has more than 16 tokens")
    rerank = service(wordpiece_file, "rerank", overflow="refuse")
    assert refusal(rerank.answer([ranking("good", "a", long)])[0]).startswith(
        "the query with passage 1 has more"
    )


def test_a_broken_run_fails_only_what_was_in_it(wordpiece_file: Path) -> None:
    own = service(wordpiece_file, "embed")
    engine = own.encoder.engine
    assert isinstance(engine, HandEngine)
    engine.break_at_width = 16
    answers = own.answer([request("good"), request("good", "good " * 100), request("bad")])
    assert isinstance(answers[1], EngineFailed)
    assert "1 x 16 tokens: out of memory" in str(answers[1])
    assert isinstance(answers[0], dict)
    assert isinstance(answers[2], dict)


def test_no_message_carries_the_text(wordpiece_file: Path) -> None:
    secret = "secret noodles " * 40
    own = service(wordpiece_file, "embed", overflow="refuse")
    for raw in (secret.encode(), secret.encode() + b"\xff"):
        assert "secret" not in refusal(own.answer([request(raw)])[0])
