"""Calibration and evaluation texts of a decoder: as the server would send them, within a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_decoders import VOCABULARY, save_decoder

from build_engines.decoder_texts import Budget, fill, load_decoder_texts, parameters
from build_engines.errors import DataError, ExportError
from build_engines.export.decoder import open_decoder
from build_engines.export.decoder_weights import Decoder
from build_engines.stack import Calibration, DataRef, Model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
SPECIAL = ("w0", "<s>", "</s>", "system", "user", "assistant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "model"
    save_decoder(folder, "llama")
    return folder


def decoder_with(folder: Path, target: Path, template: str | None) -> Decoder:
    """The checkpoint with a tokenizer of words, w5 being token 5, and a template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    words = {name: i for i, name in enumerate((*SPECIAL, *(f"w{i}" for i in range(6, VOCABULARY))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"bos_token": "<s> ", "eos_token": "</s>"} | ({"chat_template": template} if template else {})
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_decoder(target)


def model_with(tmp_path: Path, lines: list[dict[str, Any]], **settings: Any) -> Model:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    data = DataRef(spec=path.name, path=path)
    samples = settings.pop("samples", 64)
    return Model(
        name="tiny",
        task="generate",
        source="./tiny",
        calibration=Calibration(data=data, samples=samples),
        evaluation=data,
        **{"max_length": 64, **settings},
    )


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def words(first: int, count: int) -> str:
    return " ".join(f"w{10 + (first + i) % 200}" for i in range(count))


def filler(count: int = 8) -> list[dict[str, Any]]:
    return [{"text": words(20 * i, 20)} for i in range(count)]


def found_rows(decoder: Decoder, model: Model, **settings: Any) -> list[list[int]]:
    texts = load_decoder_texts(model, decoder, decoder.folder / "tokenizer.json", **settings)
    return [row.tolist() for row in texts.evaluation]


def test_a_conversation_is_its_prompt_and_the_answer(folder: Path, tmp_path: Path) -> None:
    decoder = decoder_with(folder, tmp_path / "m", TEMPLATE)
    lines = [
        chat("w50 w51", "w52 w53"),
        chat("w60", system="w61"),
        chat("w70", "w71", "w72", "w73"),
        {"text": "w80 w81"},
        {"text": "<s> w90"},
    ]
    rows = found_rows(decoder, model_with(tmp_path, lines + filler()))
    assert [1, 4, 50, 51, 5, 52, 53] in rows  # nothing after the answer, one beginning
    assert [1, 3, 61, 4, 60, 5] in rows  # without an answer: the prompt that asks for one
    assert [1, 4, 70, 5, 71, 4, 72, 5, 73] in rows
    assert [1, 80, 81] in rows
    assert [1, 90] in rows  # not <s> twice
    lengths = [len(row) for row in rows]
    assert lengths == sorted(lengths, reverse=True)


def test_a_system_message_that_the_template_refuses_goes_to_the_user(folder: Path, tmp_path: Path) -> None:
    decoder = decoder_with(folder, tmp_path / "m", REFUSING)
    rows = found_rows(decoder, model_with(tmp_path, [chat("w60", "w62", system="w61"), *filler()]))
    assert [1, 4, 61, 60, 5, 62] in rows
    always = decoder_with(folder, tmp_path / "always", "{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"data\.jsonl: .*never"):
        found_rows(always, model_with(tmp_path, [chat("w60", system="w61"), *filler()]))
    with pytest.raises(DataError, match=r"data\.jsonl: .*never"):
        found_rows(always, model_with(tmp_path, [chat("w60"), *filler()]))


def test_without_a_template_a_conversation_is_text(folder: Path, tmp_path: Path) -> None:
    decoder = decoder_with(folder, tmp_path / "m", None)
    assert [1, 50, 52, 53] in found_rows(decoder, model_with(tmp_path, [chat("w50", "w52 w53"), *filler()]))


def test_texts_are_scattered_cut_and_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    decoder = decoder_with(folder, tmp_path / "m", TEMPLATE)
    lines = [{"text": words(i, 100)} for i in range(60)]
    model = model_with(tmp_path, lines, max_length=40, samples=3)
    texts = load_decoder_texts(model, decoder, decoder.folder / "tokenizer.json", Budget(512, 330))
    rows = [row.tolist() for row in texts.evaluation]
    assert [len(row) for row in rows] == [40] * 8 + [10]
    assert rows == found_rows(decoder, model, budget=Budget(512, 330))
    first = {row[1] - 10 for row in rows}
    assert len(first) == 9
    assert max(first) > 40  # not only the file's beginning
    assert [len(row) for row in texts.calibration] == [40] * 3
    assert all(row.dtype == np.int64 for row in texts.calibration)


def test_data_that_cannot_judge_is_an_error(folder: Path, tmp_path: Path) -> None:
    decoder = decoder_with(folder, tmp_path / "m", TEMPLATE)
    with pytest.raises(DataError, match=r"data\.jsonl: 63 predicted tokens, .* at least 64"):
        found_rows(decoder, model_with(tmp_path, [{"text": words(0, 20)}] * 3 + [{"text": words(0, 3)}]))
    model = model_with(tmp_path, filler())
    without = Model(name="tiny", task="generate", source="./tiny", max_length=64)
    with pytest.raises(DataError, match="'tiny' has no evaluation data"):
        found_rows(decoder, without)
    (decoder.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match="not a tokenizer file"):
        found_rows(decoder, model)
    broken = decoder_with(folder, tmp_path / "broken", "{% for %}")
    with pytest.raises(ExportError, match="chat template"):
        found_rows(broken, model)


def test_budgets_follow_the_size(folder: Path) -> None:
    assert Budget.of(10_700_000_000) == Budget(512, 512)
    assert Budget.of(3_000_000_000) == Budget(992, 1984)
    assert Budget.of(1_000_000) == Budget(2048, 4096)
    decoder = open_decoder(folder)
    per_layer = 48 * 48 + 2 * 24 * 48 + 48 * 48 + 3 * 80 * 48
    assert parameters(decoder) == 2 * per_layer + VOCABULARY * 48


def test_no_row_takes_more_than_its_share() -> None:
    rows = fill([list(range(1000))] * 20, 1024, 4096)
    assert [len(row) for row in rows] == [128] * 8
    assert [len(row) for row in fill([[1], [1, 2], [1, 2, 3]], 512, 4096)] == [3, 2]
    assert [len(row) for row in fill([list(range(100))] * 3, 100, 4096)] == [64, 36]
