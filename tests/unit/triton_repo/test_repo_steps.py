"""The steps around an engine that Triton runs: rows and widths before it, labels and shapes behind it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from repo_fakes import seal

from triton_repo.runtime import steps
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.steps import AnswerStep, TokenizeStep, shared_widths, widths
from triton_repo.runtime.texts import BadRequest
from triton_repo.runtime.tokenization import TextTokenizer

LABELS = ["negative", "neutral", "positive"]


def step(path: Path, task: str, **serving: Any) -> TokenizeStep:
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if task == "rerank" else [])
    defaults = {"inputs": inputs, "pad_id": 7, "max_batch": 4, "max_length": 40, "overflow": "truncate"}
    manifest = {"task": task, "serving": defaults | serving}
    return TokenizeStep(TextTokenizer(path, max_length=manifest["serving"]["max_length"]), manifest)


def column(*texts: str) -> Any:
    return np.array([text.encode() for text in texts], dtype=object).reshape(-1, 1)


def refusal(answer: Any) -> str:
    assert isinstance(answer, BadRequest)
    return str(answer)


@given(st.integers(1, 2000))
def test_widths_are_few_and_reach_the_longest_text(longest: int) -> None:
    found = widths(longest)
    assert found[-1] == longest
    assert list(found) == sorted(set(found))
    assert len(found) <= 8
    # Padding at most doubles a text of more than the narrowest width.
    assert all(wide <= 2 * narrow for narrow, wide in itertools.pairwise(found))


def test_rows_are_padded_to_the_next_width(wordpiece_file: Path) -> None:
    own = step(wordpiece_file, "classify")
    (short,), (long,) = (own.answer([{"text": column(*texts)}]) for texts in (["good"], ["good", "a " * 20]))
    assert isinstance(short, dict)
    assert isinstance(long, dict)
    assert short["input_ids"].shape == (1, 16)
    assert long["input_ids"].shape == (2, 32)
    ids = own.reader.tokenizer.singles(["good"])[0].ids
    assert short["input_ids"][0].tolist() == ids + [7] * (16 - len(ids))
    assert short["attention_mask"].sum() == len(ids)
    assert set(short) == {"input_ids", "attention_mask", "truncated"}
    assert {value.dtype for name, value in short.items() if name != "truncated"} == {np.dtype(np.int64)}
    real = 2 * len(ids) + 22
    assert own.snapshot() == {"tokens_total": real, "padding_total": 80 - real, "truncated_total": 0}


@given(st.lists(st.tuples(st.integers(1, 8), st.sampled_from([16, 32, 64, 128, 256, 512])), max_size=8))
def test_shared_widths_cost_least(needs: list[tuple[int, int]]) -> None:
    def cost(chosen: Sequence[int]) -> int:
        """Triton's runs: neighbours of one width share one."""
        changes = sum(a != b for a, b in itertools.pairwise(chosen))
        tokens = sum(rows * width for (rows, _), width in zip(needs, chosen, strict=True))
        return steps._RUN_TOKENS * (changes + bool(chosen)) + tokens

    found = shared_widths(needs)
    assert all(width >= need for width, (_, need) in zip(found, needs, strict=True))
    assert set(found) <= {need for _, need in needs}
    for cuts in itertools.product([False, True], repeat=max(0, len(needs) - 1)):
        other: list[int] = []
        group: list[tuple[int, int]] = []
        for need, cut in zip(needs, [*cuts, True], strict=False):
            group.append(need)
            if cut:
                other += [max(width for _, width in group)] * len(group)
                group = []
        assert cost(found) <= cost(other)


def test_short_texts_wait_with_long_ones_but_not_with_very_long_ones(wordpiece_file: Path) -> None:
    own = step(wordpiece_file, "embed", max_length=512)
    texts = ["good", "a " * 50, "good", "a " * 50]
    found = own.answer([{"text": column(text)} for text in texts])
    assert [answer["input_ids"].shape[1] for answer in found if isinstance(answer, dict)] == [64] * 4
    found = own.answer([{"text": column(text)} for text in ("good", "a " * 500, "", "good")])
    assert [answer["input_ids"].shape[1] for answer in found if isinstance(answer, dict)] == [16, 512, 16]


def test_a_text_that_is_cut_is_flagged_and_has_the_full_width(wordpiece_file: Path) -> None:
    own = step(wordpiece_file, "embed")
    (answer,) = own.answer([{"text": column("a " * 90, "good")}])
    assert isinstance(answer, dict)
    assert answer["truncated"].tolist() == [[True], [False]]
    assert answer["input_ids"].shape == (2, 40)
    assert own.snapshot()["truncated_total"] == 1
    refusing = step(wordpiece_file, "embed", overflow="refuse")
    found = refusing.answer([{"text": column("a " * 90)}, {"text": column("good")}])
    assert "has more than 40 tokens" in refusal(found[0])
    assert isinstance(found[1], dict)


def test_pairs_become_rows_that_know_the_request_they_came_from(wordpiece_file: Path) -> None:
    own = step(wordpiece_file, "rerank")
    passages = np.array([[b"bad", b"the noodles"], [b"review", b"a"]], dtype=object)
    answer, too_many = own.answer(
        [
            {"query": column("good", "noodles"), "passages": passages},
            {"query": column("good"), "passages": np.array([[b"a"] * 5], dtype=object)},
        ]
    )
    assert isinstance(answer, dict)
    assert answer["input_ids"].shape == answer["token_type_ids"].shape == (4, 16)
    assert answer["shape"].tolist() == [[2, 2]] * 4
    assert answer["truncated"].shape == (2, 2)
    wanted = own.reader.tokenizer.pairs([("noodles", ["review"])])[0][0].ids
    assert answer["input_ids"][2, : len(wanted)].tolist() == wanted
    assert "are 5 pairs; this model takes at most 4" in refusal(too_many)


def test_a_bad_request_does_not_disturb_its_neighbours(wordpiece_file: Path) -> None:
    own = step(wordpiece_file, "classify")
    alone = own.answer([{"text": column("good")}])[0]
    found = own.answer([{"text": column("")}, {"text": column("good")}, {"text": column("bad", " ")}])
    assert refusal(found[0]) == "'text' is empty"
    assert refusal(found[2]) == "'text' 1 is blank"
    assert isinstance(alone, dict)
    assert isinstance(found[1], dict)
    assert found[1]["input_ids"].tolist() == alone["input_ids"].tolist()


def test_labels_come_best_first() -> None:
    own = AnswerStep({"task": "classify", "serving": {"labels": LABELS}})
    probabilities = np.array([[0.1, 0.7, 0.2], [0.4, 0.2, 0.4]], dtype=np.float32)
    first, second = own.answer([{"probabilities": probabilities}, {"probabilities": probabilities[1:]}])
    assert first["labels"].tolist() == [
        [b"neutral", b"positive", b"negative"],
        [b"negative", b"positive", b"neutral"],
    ]
    assert first["scores"].tolist() == np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]], np.float32).tolist()
    assert second["labels"].shape == (1, 3)


def test_equal_scores_keep_the_checkpoints_order() -> None:
    labels = [f"label {number}" for number in range(64)]
    own = AnswerStep({"task": "classify", "serving": {"labels": labels}})
    probabilities = np.array([[0.1, 0.2, 0.2, 0.1] * 16], dtype=np.float32)
    (answer,) = own.answer([{"probabilities": probabilities}])
    likely = [label for label, value in zip(labels, probabilities[0], strict=True) if value > 0.15]
    wanted = likely + [label for label in labels if label not in likely]
    assert [label.decode() for label in answer["labels"][0]] == wanted


def test_scores_get_the_shape_of_their_request() -> None:
    own = AnswerStep({"task": "rerank", "serving": {"labels": None}})
    scores = np.arange(6, dtype=np.float32).reshape(6, 1)
    shape = np.tile(np.array([2, 3], np.int32), (6, 1))
    (answer,) = own.answer([{"scores": scores, "shape": shape}])
    assert answer["scores"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_step_opens_without_the_engine_and_checks_its_own_files(
    tmp_path: Path, wordpiece_file: Path
) -> None:
    (tmp_path / "engine.onnx").write_bytes(b"engine")
    (tmp_path / "tokenizer.json").write_bytes(wordpiece_file.read_bytes())
    seal(tmp_path, "m", "fp16", "classify")
    (tmp_path / "engine.onnx").unlink()
    assert TokenizeStep.open(tmp_path).inputs == ("text",)
    assert AnswerStep.open(tmp_path).inputs == ("probabilities",)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(EngineRefused, match=r"tokenizer\.json: 2 bytes"):
        TokenizeStep.open(tmp_path)
