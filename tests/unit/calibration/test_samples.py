"""The readers: what they accept, and that everything else names its file and line."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
from bounded import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engines.errors import DataError
from calibration.reading import MAX_LINE_CHARACTERS, MAX_LINES
from calibration.samples import RankingGroup, Review, data_file, load_conversations, load_groups, load_texts

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda t: bool(t.strip())
)
LABELS = st.none() | st.sampled_from(["negative", "positive"])


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, LABELS), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_jsonl_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str | None]], ascii_only: bool, bom: bool
) -> None:
    lines = [json.dumps({"text": t} | ({"label": n} if n else {}), ensure_ascii=ascii_only) for t, n in rows]
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8-sig" if bom else "utf-8", newline="")
    assert load_texts(path) == [Review(t, n) for t, n in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, LABELS), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_csv_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str | None]], end: str
) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["text", "label"])
    writer.writerows([t, n or ""] for t, n in rows)
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text(buffer.getvalue(), encoding="utf-8", newline="")
    assert load_texts(path) == [Review(t, n) for t, n in rows]


def test_csv_with_quotes_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = (
        '\ufefflabel,text\r\npositive,"She said ""great"", twice.\nAnd, again."\r\n\r\nnegative,나빠요\r\n'
    )
    assert load_texts(written(tmp_path, "a.csv", content)) == [
        Review('She said "great", twice.\nAnd, again.', "positive"),
        Review("나빠요", "negative"),
    ]


def test_txt_is_one_text_per_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.TXT", "\ufeffone\r\n\n  \n두 번째\u2028still\n")
    assert load_texts(path) == [Review("one", None), Review("두 번째\u2028still", None)]


@pytest.mark.parametrize(
    ("name", "content", "line", "problem"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', 3, "not valid JSON"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b", "lable": "x"}',
            2,
            "key 2 is unknown (did you mean 'label'?)",
        ),
        ("a.jsonl", '{"label": "x"}', 1, "text missing; found: label"),
        ("a.jsonl", '{"text": "a", "text": "b"}', 1, "a key is given twice"),
        ("a.jsonl", '["a"]', 1, "expected an object, found a list"),
        ("a.jsonl", '{"text": 3}', 1, "'text' must be a string, not a number"),
        ("a.jsonl", '{"text": " "}', 1, "'text' is empty"),
        ("a.jsonl", '{"text": "a", "label": 1}', 1, "'label' must be a string"),
        ("a.jsonl", '{"text": "\\ud83d"}', 1, "surrogate"),
        ("a.jsonl", '{"text": NaN}', 1, "NaN is not JSON"),
        ("a.csv", 'text,label\n"two\nlines",x\nextra,x,y\n', 4, "3 fields where the header has 2"),
        ("a.csv", "text,score\na,1\n", 1, "key 2 is unknown; allowed: label, text"),
        ("a.csv", "label\na\n", 1, "text missing"),
        ("a.csv", "text,text\na,b\n", 1, "'text' is given twice"),
        ("a.csv", 'text\nfine\n"open\n', 3, "not valid CSV"),
        ("a.csv", "text,label\n,x\n", 2, "'text' is empty"),
        ("a.txt", b"fine\n" + "나쁨".encode("cp949"), 2, "not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), 1, "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, name: str, content: str | bytes, line: int, problem: str
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_texts(path)
    assert f"{path}, line {line}: " in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"query": "q", "passages": [], "relevance": []}, "at least one text"),
        ({"query": "q", "passages": "ab", "relevance": [1, 0]}, "at least one text"),
        ({"query": "q", "passages": ["a", "b"], "relevance": [1]}, "a list of 2 numbers"),
        ({"query": "q", "passages": ["a"], "relevance": [-1]}, "relevance -1 is not"),
        ({"query": "q", "passages": ["a"], "relevance": [True]}, "relevance True is not"),
        ({"query": "q", "passages": ["a"], "relevance": [10**400]}, "is not a finite number"),
        ({"query": "q", "passages": ["a", "b"], "relevance": [0, 0]}, "nothing to rank"),
        ({"query": "", "passages": ["a"], "relevance": [1]}, "'query' is empty"),
        ({"query": "q", "passages": ["a", 5], "relevance": [1, 0]}, "'passages[1]' must be a string"),
        ({"query": "q", "passages": ["a"], "relevanse": [1]}, "did you mean 'relevance'?"),
        ({"query": "q", "passages": ["a"]}, "relevance missing"),
    ],
)
def test_a_bad_group_is_named(tmp_path: Path, record: dict[str, object], problem: str) -> None:
    good = json.dumps({"query": "q", "passages": ["a", "b"], "relevance": [2, 0.5]})
    path = written(tmp_path, "g.jsonl", f"{good}\n{json.dumps(record)}\n")
    with pytest.raises(DataError) as caught:
        load_groups(path)
    assert f"{path}, line 2: " in str(caught.value)
    assert problem in str(caught.value)


def test_groups_are_typed(tmp_path: Path) -> None:
    path = written(tmp_path, "g.jsonl", '{"query": "q", "passages": ["a", "b"], "relevance": [2, 0.5]}')
    assert load_groups(path) == [RankingGroup("q", ("a", "b"), (2.0, 0.5))]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.txt", "\n \n"), ("a.csv", "text\n"), ("b.csv", "")]
)
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match="holds no data") as caught:
        load_texts(path)
    assert str(path) in str(caught.value)


def test_labels_must_be_the_models(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\na,positive\nb,Negatve\n")
    with pytest.raises(DataError, match=r"line 3: the label is not .*did you mean 'negative'"):
        load_texts(path, labels=["negative", "positive"], limit=1)
    unlabelled = written(tmp_path, "b.txt", "a\n")
    with pytest.raises(DataError, match="line 1: no label"):
        load_texts(unlabelled, labels=["negative", "positive"])


def test_sampling_is_deterministic_and_keeps_file_order(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "\n".join(f"t{i:03d}" for i in range(200)))
    texts = [review.text for review in load_texts(path, limit=20, seed=7)]
    # Fixed: the choice must stay the same on every machine and Python version.
    assert texts[:2] == FIRST_OF_SEED_7
    assert texts == sorted(texts)
    assert len(set(texts)) == 20
    assert set(texts) <= {review.text for review in load_texts(path, limit=40, seed=7)}
    assert texts != [review.text for review in load_texts(path, limit=20, seed=8)]
    assert len(load_texts(path, limit=1000)) == 200
    with pytest.raises(DataError, match="at least 1"):
        load_texts(path, limit=0)


FIRST_OF_SEED_7 = ["t004", "t007"]


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("bundled:review:train", "did you mean 'reviews'"),
        ("bundled:reviews:evaluate", "did you mean 'evaluation'"),
        ("bundled:reviews", "three parts"),
        ("bundled:ranking:train", "use 'bundled:reviews:train'"),
        ("bundled:conversations:train", "use 'bundled:reviews:train'"),
    ],
)
def test_an_unknown_bundled_name_gets_the_nearest(ref: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_texts(ref)


def test_bundled_texts_are_not_groups() -> None:
    with pytest.raises(DataError, match="use 'bundled:ranking:train'"):
        load_groups("bundled:reviews:train")
    assert data_file("bundled:ranking:train").name == "ranking.train.jsonl"


def test_missing_files_folders_and_other_formats(tmp_path: Path) -> None:
    written(tmp_path, "reviews.csv", "text\na\n")
    with pytest.raises(DataError, match=r"does not exist \(did you mean 'reviews.csv'\?\)"):
        load_texts(tmp_path / "review.csv")
    with pytest.raises(DataError, match="does not exist either"):
        load_texts(str(tmp_path / "nowhere" / "a.csv"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        load_texts(tmp_path / "folder.jsonl")
    with pytest.raises(DataError, match=r"save the data as \.jsonl or \.csv or \.txt"):
        load_texts(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="JSONL only"):
        load_groups(tmp_path / "reviews.csv")


SECRET = "Seojun-complained-about-cold-noodles"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", f"{SECRET},1\nanother text,2\n"),  # no header
        ("a.csv", f"text,label\n{SECRET},{SECRET}\n"),  # a label that is none
        ("a.csv", f'text\n"{SECRET}\n'),
        ("a.csv", f"text,label\n{SECRET}\n"),
        ("a.jsonl", json.dumps({SECRET: 1})),
        ("a.jsonl", json.dumps({"text": SECRET, SECRET: SECRET})),
        ("a.jsonl", json.dumps({"text": [SECRET]})),
        ("a.jsonl", json.dumps(SECRET)),
        ("a.jsonl", f'{{"text": "{SECRET}'),
        ("a.jsonl", json.dumps({"text": SECRET, "label": {SECRET: 1}})),
        ("a.jsonl", json.dumps({"query": SECRET, "passages": [SECRET, 5], "relevance": [SECRET, 1]})),
        ("a.jsonl", json.dumps({"query": SECRET, "passages": [SECRET], "relevance": [SECRET]})),
        ("a.jsonl", json.dumps({"messages": [{"role": SECRET, "content": SECRET}]})),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", SECRET: SECRET}]})),
        ("a.jsonl", json.dumps({"messages": [SECRET]})),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": SECRET}] * 2})),
    ],
)
def test_an_error_never_repeats_a_text(tmp_path: Path, name: str, content: str) -> None:
    """Errors end up in logs; they name file and line."""
    path = written(tmp_path, name, content)
    refused: list[str] = []
    for load in (
        lambda: load_texts(path, labels=["positive"]),
        lambda: load_groups(path),
        lambda: load_conversations(path),
    ):
        try:
            load()
        except DataError as error:
            refused.append(str(error))
    assert refused
    assert not any(part in message for part in (SECRET, "cold-noodles") for message in refused)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("\n" * (MAX_LINES + 1), "has more than 1,000,000 lines"),
        ("a\n" + "b" * (MAX_LINE_CHARACTERS + 1), "line 2: 8,000,001 characters, more than 8,000,000"),
    ],
)
def test_lines_without_end(tmp_path: Path, content: str, problem: str) -> None:
    path = written(tmp_path, "a.txt", content)
    with pytest.raises(DataError, match=problem):
        bounded(load_texts, path)


def test_a_line_of_a_gigabyte(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "')
    with path.open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="is larger than 64 MiB"):
        bounded(load_texts, path)


def test_a_name_that_is_long_is_compared_in_part(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", json.dumps({"text" * 500_000: 1}))
    with pytest.raises(DataError, match="key 1 is unknown"):
        bounded(load_texts, path)


def test_lists_in_lists_without_end(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": ' + "[" * 100_000)
    with pytest.raises(DataError, match="line 1: "):
        bounded(load_texts, path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is no regular file"):
        bounded(load_texts, tmp_path / "a.txt")
