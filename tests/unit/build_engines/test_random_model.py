"""The random Llama: loads in Transformers, sane activations, the same bytes again, the advertised size."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from build_engines import random_model
from build_engines.errors import ArtifactError
from build_engines.random_model import RandomLlama, write_random_llm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

SMALL = RandomLlama(layers=6, hidden=64, ffn=128, heads=4, kv_heads=2, vocabulary=600, positions=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random") / "llama"
    write_random_llm(out, SMALL)
    return out


def test_it_loads_with_every_tensor(folder: Path) -> None:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == SMALL.vocabulary == model.config.vocab_size
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_activations_stay_near_one(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(100, 164)[None]
    with torch.inference_mode():
        found = model(ids, output_hidden_states=True)
    last = found.hidden_states[-2]
    assert 0.2 < last.std() < 5
    assert last.abs().max() < 50
    # Not a model that says one word whatever it reads.
    assert len(set(found.logits[0].argmax(-1).tolist())) > 16


def test_the_same_shape_is_the_same_file_and_another_replaces_it(folder: Path, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()

    write_random_llm(tmp_path / "again", SMALL)
    assert digest(tmp_path / "again") == digest(folder)
    written = (tmp_path / "again" / "model.safetensors").stat().st_mtime_ns
    said: list[float] = []
    write_random_llm(tmp_path / "again", SMALL, progress=said.append)
    assert said == [1.0]
    assert (tmp_path / "again" / "model.safetensors").stat().st_mtime_ns == written
    write_random_llm(tmp_path / "again", replace(SMALL, seed=1), progress=said.append)
    assert said[1] < 0.1
    assert said[1:] == sorted(said[1:])
    assert digest(tmp_path / "again") != digest(folder)


def test_a_head_of_its_own(tmp_path: Path) -> None:
    shape = replace(SMALL, layers=1, tied=False)
    write_random_llm(tmp_path / "untied", shape)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_benchmark_llama_has_189_million_parameters() -> None:
    count = sum(prod(dims) for _, dims, _ in random_model._llama_tensors(RandomLlama()))
    assert round(count / 1e6) == 189


def test_a_folder_of_somebody_s_own_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="would be deleted"):
        write_random_llm(tmp_path, SMALL)
    assert (tmp_path / "letter.txt").read_text() == "dear"
