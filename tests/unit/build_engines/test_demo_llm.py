"""The demo LLM, a few steps of a narrow one: its folder, its chat template; a second run is the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from build_engines import demo_llm
from build_engines.demo_llm import LlmRecipe
from build_engines.errors import GateError
from calibration.samples import load_conversations

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL = LlmRecipe(
    vocabulary=600, hidden=32, ffn=64, layers=2, heads=4, kv_heads=2, length=64, rows=2, steps=6, threads=2
)
MESSAGES = [
    {"role": "system", "content": "짧게 답하세요."},
    {"role": "user", "content": "안녕하세요? Which review 👩‍🍳 is 12 days old?"},
]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "metrics.json"
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo-llm") / "assistant"
    demo_llm.write_demo_llm(out, max_steps=6, recipe=SMALL)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_folder_is_a_checkpoint(folder: Path, tokenizer: Any) -> None:
    import torch

    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        digests(folder)
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == generation[name] == getattr(tokenizer, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    logits = model(**tokenizer("배터리가 오래가요", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer) == SMALL.vocabulary
    assert torch.isfinite(logits).all()


def test_the_tokenizer_spells_any_text(folder: Path, tokenizer: Any) -> None:
    served = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (" 값을 12,345원에 샀어요.\n\n👩‍🍳👍🏽 ﷽", "\u1100\u1161 ᄒ", "<|end|> inside"):
        ids = tokenizer(text).input_ids
        assert ids == served.encode(text).ids
        assert ids[0] == tokenizer.bos_token_id
        assert served.decode(ids[1:], skip_special_tokens=False) == text
    assert served.truncation is None
    assert served.padding is None
    # Digits one by one: numbers are as similar as they look.
    assert len(served.encode("2026", add_special_tokens=False).ids) == 4


def test_the_chat_template(tokenizer: Any) -> None:
    begun = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert begun == (
        "<|begin|><|system|>짧게 답하세요.<|end|><|user|>안녕하세요? Which review 👩‍🍳 is 12 days old?<|end|>"
        "<|assistant|>"
    )
    answered = [*MESSAGES, {"role": "assistant", "content": " 네. \n"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{begun}네.<|end|>"
    ids = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "tool", "content": "x"}], "unknown role tool"),
        ([*MESSAGES, MESSAGES[0]], "a system message must come first"),
    ],
)
def test_the_chat_template_refuses(tokenizer: Any, messages: list[dict[str, str]], problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_another_process_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from build_engines import demo_llm; "
        f"from build_engines.demo_llm import LlmRecipe; "
        f"demo_llm.write_demo_llm(Path(sys.argv[1]), max_steps=6, recipe={SMALL!r})"
    )
    # Another hash seed: no order of a set may decide what is written.
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "again"], check=True, env=environment)
    assert digests(tmp_path / "again") == digests(folder)


def test_training_lowers_the_loss_of_every_part(folder: Path, tmp_path: Path) -> None:
    import safetensors.numpy

    demo_llm.write_demo_llm(tmp_path / "first", max_steps=1, recipe=SMALL)
    before = safetensors.numpy.load_file(tmp_path / "first" / "model.safetensors")
    after = safetensors.numpy.load_file(folder / "model.safetensors")
    assert [name for name in before if (before[name] == after[name]).all()] == []
    assert "lm_head.weight" not in after  # one table for embedding and head


def test_gradients_of_two_threads_are_those_of_one(tokenizer: Any) -> None:
    import torch

    model = demo_llm._new_model(SMALL, tokenizer)
    ids = torch.randint(0, SMALL.vocabulary, (4, 65), generator=torch.Generator().manual_seed(1))
    batch = torch.stack([ids.float(), torch.where(ids % 3 == 0, 1.0, 0.4)], -1)
    whole = float(batch[:, 1:, 1].sum())
    twin = demo_llm._sharing_copy(model)
    demo_llm._add_gradients(model, batch[:1], whole)
    demo_llm._add_gradients(twin, batch[1:], whole)
    demo_llm._collect_gradients([model, twin])
    shared = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    demo_llm._add_gradients(model, batch, whole)
    for found, parameter in zip(shared, model.parameters(), strict=True):
        error = (found - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.02  # the multiplications are in BF16
    # One memory: a step of the model is a step of its copy.
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)
    assert all(p.grad is None for p in twin.parameters())


def test_a_current_model_is_kept_and_another_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(demo_llm, "_train", never)
    said: list[float] = []
    demo_llm.write_demo_llm(folder, max_steps=6, recipe=SMALL, progress=said.append)
    assert said == [1.0]
    with pytest.raises(AssertionError, match="trained again"):
        demo_llm.write_demo_llm(folder, max_steps=5, recipe=SMALL)
    assert (folder / "model.safetensors").exists()
    assert [p.name for p in folder.parent.iterdir() if p.suffix != ".lock"] == ["assistant"]


def test_a_model_above_its_perplexity_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = load_conversations("bundled:conversations:evaluation", limit=3)
    monkeypatch.setattr(demo_llm, "_train", lambda *_: None)
    monkeypatch.setattr(demo_llm, "load_conversations", lambda _ref: few)
    with pytest.raises(GateError, match=r"reached perplexity \d+\.\d+; at most 50 is allowed"):
        demo_llm.write_demo_llm(tmp_path / "out", recipe=replace(SMALL, max_perplexity=50))
    assert not (tmp_path / "out").exists()


def test_rows_are_cut_from_every_document_in_a_new_order_each_pass() -> None:
    documents = [[10 * i + j for j in range(i + 1)] for i in range(8)]
    recipe = replace(SMALL, length=6)
    rows = demo_llm._rows(documents, recipe)
    taken = [next(rows) for _ in range(12)]
    # A row ends with the token that the next one begins with, so that every token is predicted once.
    assert all(len(row) == 7 for row in taken)
    assert all(row[-1] == following[0] for row, following in itertools.pairwise(taken))
    stream = [token for row in taken for token in row[:6]]
    everything = sorted(token for document in documents for token in document)
    assert sorted(stream[:36]) == everything
    assert sorted(stream[36:72]) == everything
    assert stream[:36] != stream[36:72]


def test_answers_weigh_more_than_prompts(tokenizer: Any) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "네."}, {"role": "user", "content": "더?"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    answer, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    weighted = demo_llm._weighted(ids, answer, end, 0.25)
    assert [token for token, _ in weighted] == ids
    assert tokenizer.decode([token for token, weight in weighted if weight == 1.0]) == "네.<|end|>"
    assert {weight for _, weight in weighted} == {0.25, 1.0}


def test_perplexity_counts_every_token_once() -> None:
    import torch

    class Fixed:
        """Gives every token probability 1/8, but token 3, which follows with probability 1/2."""

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            logits = torch.full((*input_ids.shape, 5), 1 / 8).log()
            logits[..., 3] = torch.tensor(1 / 2).log()
            return type("Output", (), {"logits": logits})

    assert demo_llm._perplexity(Fixed(), [[0, 3, 3], [1, 2]]) == pytest.approx((2 * 2 * 8) ** (1 / 3))
