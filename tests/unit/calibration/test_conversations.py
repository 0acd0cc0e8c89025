"""Conversations: what the reader accepts and names when it does not, and what the bundled ones promise."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from build_engines.errors import DataError
from calibration.samples import ROLES, SPLITS, Conversation, Message, load_conversations

BUNDLED = {"train": 1060, "calibration": 128, "evaluation": 180}
HANGUL = re.compile("[가-힣]")


def chat(*contents: str, system: str | None = None) -> dict[str, list[dict[str, str]]]:
    turns = [{"role": ROLES[1 + i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def written(tmp_path: Path, name: str, content: str) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode())
    return path


def test_messages_and_texts_may_share_a_file(tmp_path: Path) -> None:
    rows: list[Any] = [
        chat("안녕", "네", "또?", system="짧게"),
        {"text": "a plain text", "label": "positive"},
    ]
    path = written(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    first, second = load_conversations(path)
    assert first == Conversation(
        (
            Message("system", "짧게"),
            Message("user", "안녕"),
            Message("assistant", "네"),
            Message("user", "또?"),
        ),
        None,
    )
    assert first.turns() == rows[0]["messages"]
    assert second == Conversation((), "a plain text")
    assert second.turns() == []


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "one\n\n두 번째\n"), ("a.csv", 'text,label\none,\n"두 번째",positive\n')]
)
def test_plain_texts_are_read_from_txt_and_csv(tmp_path: Path, name: str, content: str) -> None:
    loaded = load_conversations(written(tmp_path, name, content))
    assert loaded == [Conversation((), "one"), Conversation((), "두 번째")]


def message(**fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "q"}, fields]}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"mesages": []}, "key 1 is unknown (did you mean 'messages'?)"),
        ({"label": "x"}, "messages or text missing; found: label"),
        ({}, "messages or text missing; found: nothing"),
        ({**chat("q"), "text": "t"}, "text beside 'messages'"),
        ({"messages": []}, "'messages' must be a list with at least one message"),
        ({"messages": "q"}, "'messages' must be a list with at least one message"),
        ({"messages": ["q"]}, "'messages[0]' must be an object, not a string"),
        (message(role="asistant", content="a"), "messages[1]: unknown role (did you mean 'assist"),
        (message(role=["user"], content="a"), "messages[1]: the role is a list; allowed: system, user"),
        (message(role="assistant"), "messages[1]: content missing; found: role"),
        (message(role="assistant", content="a", name="b"), "messages[1]: key 3 is unknown"),
        (message(role="assistant", content=None), "'messages[1].content' must be a string, not null"),
        (message(role="assistant", content=[{"type": "text"}]), "'messages[1].content' must be a string"),
        (message(role="assistant", content=" \n"), "'messages[1].content' is empty"),
        (message(role="assistant", content="\ud83d"), "half of a surrogate pair"),
        (message(role="user", content="q"), "messages[1] has the role 'user' where 'assistant' is due"),
        (message(role="system", content="s"), "messages[1] has the role 'system' where 'assistant' is due"),
        ({"messages": [{"role": "system", "content": "s"}]}, "a system message alone"),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]},
            "messages[1] has the role 'assistant' where 'user' is due",
        ),
        ({"text": 3}, "'text' must be a string, not a number"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path: Path, record: dict[str, object], problem: str) -> None:
    content = f"{json.dumps(chat('q', 'a'))}\n{json.dumps(record)}\n"
    path = written(tmp_path, "a: b.jsonl", content)
    with pytest.raises(DataError) as caught:
        load_conversations(path)
    assert f"{path}, line 2: " in str(caught.value)
    assert problem in str(caught.value)


def test_a_key_given_twice_inside_a_message(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "role": "system", "content": "q"}]}'
    with pytest.raises(DataError, match="line 1: a key is given twice"):
        load_conversations(written(tmp_path, "a.jsonl", line))


def test_other_bundled_sets() -> None:
    assert load_conversations("bundled:reviews:calibration", limit=3)[0].text
    with pytest.raises(DataError, match=r"holds queries .*not conversations") as caught:
        load_conversations("bundled:ranking:calibration")
    assert "use 'bundled:conversations:calibration'" in str(caught.value)


@pytest.fixture(scope="module")
def bundled() -> dict[str, list[Conversation]]:
    return {split: load_conversations(f"bundled:conversations:{split}") for split in SPLITS}


def test_counts_languages_and_roles(bundled: dict[str, list[Conversation]]) -> None:
    assert {split: len(rows) for split, rows in bundled.items()} == BUNDLED
    for rows in bundled.values():
        korean = sum(bool(HANGUL.search(row.messages[0].content)) for row in rows)
        assert 0.45 * len(rows) <= korean <= 0.55 * len(rows)
        system = sum(row.messages[0].role == "system" for row in rows)
        assert 0.35 * len(rows) <= system <= 0.55 * len(rows)
        several = sum(sum(message.role == "user" for message in row.messages) > 1 for row in rows)
        assert several >= 0.4 * len(rows)
    # Training needs the answer; calibration and evaluation also see prompts as a server does.
    assert all(row.messages[-1].role == "assistant" for row in bundled["train"])
    assert any(row.messages[-1].role == "user" for row in bundled["evaluation"])


def normalised(text: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


def test_no_first_message_is_in_two_splits(bundled: dict[str, list[Conversation]]) -> None:
    def first(rows: Sequence[Conversation]) -> set[str]:
        return {normalised(next(m.content for m in row.messages if m.role == "user")) for row in rows}

    openings = [first(bundled[split]) for split in SPLITS]
    assert not openings[0] & openings[1]
    assert not openings[0] & openings[2]
    assert not openings[1] & openings[2]


def test_evaluation_has_sentences_of_its_own(bundled: dict[str, list[Conversation]]) -> None:
    def sentences(split: str) -> set[str]:
        texts = (m.content for row in bundled[split] for m in row.messages if m.role == "user")
        return {normalised(part) for text in texts for part in re.split(r"(?<=[.!?])\s|\n", text)} - {""}

    own = sentences("evaluation") - sentences("train") - sentences("calibration")
    assert len(own) >= 0.25 * len(sentences("evaluation"))
    assert len(sentences("evaluation") - own) >= 0.25 * len(sentences("evaluation"))
