"""Tokenizers of both kinds (WordPiece, byte-level BPE) and finished engine folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repo_fakes import seal
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = [
    "the",
    "noodles",
    "were",
    "good",
    "bad",
    "review",
    "##s",
    "##ing",
    "맛있",
    "##어요",
    "별로",
    "##예요",
]
CORPUS = [
    "the noodles were good",
    "국수가 정말 맛있어요",
    "not good, not bad; a review of reviews",
    "  spaces  ",
]


def wordpiece() -> Tokenizer:
    """BERT's normalizer, splitter and template over a small vocabulary with every ASCII letter."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz.,!?"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def byte_level() -> Tokenizer:
    """RoBERTa's kind: byte-level BPE, two separators between a pair, all of one segment."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


@pytest.fixture(scope="session", params=[wordpiece, byte_level], ids=["wordpiece", "byte-level"])
def tokenizer_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = request.param()
    # As checkpoints carry it: settings of a training run that serving must not take over.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def wordpiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wordpiece") / "tokenizer.json"
    wordpiece().save(str(path))
    return path


@pytest.fixture
def engine_folder(tmp_path: Path, wordpiece_file: Path) -> Callable[..., Path]:
    """Write a finished engine folder as the build leaves it; the engine file itself is never run here."""

    def write(engines: Path, model: str, precision: str, task: str, **serving: Any) -> Path:
        folder = engines / model / precision / "onnxruntime"
        folder.mkdir(parents=True)
        (folder / "engine.onnx").write_bytes(f"{model} {precision}".encode() * 100)
        (folder / "tokenizer.json").write_bytes(wordpiece_file.read_bytes())
        seal(folder, model, precision, task, **serving)
        return folder

    return write
