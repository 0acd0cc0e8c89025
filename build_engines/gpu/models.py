"""What is measured: three random encoders and a random Llama, written here, so that no hub is needed.

Weights do not change how long a run takes; their number and shapes do. Texts are the bundled ones, and few:
random weights answer at random, so the gates
here ask little more than that FP16 stays close to FP32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from build_engines.random_model import RandomLlama, write_random_llm
from calibration.samples import data_file, load_groups, load_texts

CARD_MIB: Final = 16_303  # an RTX 5070 Ti's: what the stack is planned for and must stay inside
ENCODERS: Final = {"classifier": "classify", "embedder": "embed", "reranker": "rerank"}
LLM: Final = "assistant"
_EVALUATED, _GROUPS, _CONVERSATIONS, _CALIBRATED = 24, 6, 3, 16
_LABELS = ("negative", "positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSize:
    """BERT-base unless told otherwise."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    ffn: int = 3072
    vocabulary: int = 30522
    positions: int = 512

    def products(self, batch: int, length: int) -> float:
        """Floating-point operations of one run over full rows: Linears, and attention's two products."""
        linear = 4 * self.hidden * self.hidden + 2 * self.hidden * self.ffn
        attention = 2 * length * self.hidden
        return 2.0 * self.layers * batch * length * (linear + attention)

    def weight_bytes(self, each: float) -> float:
        """Bytes of the layers' Linears, which every run reads, at so many bytes a weight."""
        return each * self.layers * (4 * self.hidden * self.hidden + 2 * self.hidden * self.ffn)


def one_billion() -> RandomLlama:
    """Llama 3.2 1B's layers with a smaller vocabulary: 1.04 billion parameters."""
    return RandomLlama(
        layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, vocabulary=32768, positions=4096
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is, and at which shapes it is run."""

    encoder: EncoderSize = field(default_factory=EncoderSize)
    llm: RandomLlama = field(default_factory=one_billion)
    shapes: tuple[tuple[int, int], ...] = ((1, 32), (8, 64), (32, 128), (64, 256))
    encoder_precisions: tuple[str, ...] = ("fp16", "int8")
    llm_precisions: tuple[str, ...] = ("int8-weights", "fp16")
    slots: int = 16
    capacity: int = 2048
    chunk: int = 512
    prompt: int = 512
    new: int = 64
    batches: tuple[int, ...] = (1, 4, 8, 16)

    @property
    def max_batch(self) -> int:
        return max(batch for batch, _ in self.shapes)

    @property
    def max_length(self) -> int:
        return max(length for _, length in self.shapes)


def write_model(folder: Path, name: str, sizes: Sizes) -> None:
    """One checkpoint, and the texts, in `folder`; what is there and the same is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_texts(folder / "texts")
    if name == LLM:
        write_random_llm(folder / "models" / name, sizes.llm)
    else:
        write_encoder(folder / "models" / name, ENCODERS[name], sizes.encoder)


def write_stack_file(
    folder: Path, sizes: Sizes, targets: Sequence[str], capability: str, portable: bool
) -> Path:
    """`folder`/stack.toml for those models.

    `capability` is the compute capability to compile for, "12.0"; `portable` asks for engines of every card
    that the library knows, where it does not compile for this one. The CPU's target is always named: it runs
    every precision, which a stack's targets must together.
    """
    path = folder / "stack.toml"
    named = dict.fromkeys([*targets, "onnxruntime"])
    path.write_text(_stack_file(sizes, list(named), capability, portable), encoding="utf-8")
    return path


def _stack_file(sizes: Sizes, targets: Sequence[str], capability: str, portable: bool) -> str:
    lines = [
        'name = "bench-gpu"',
        f'card = {{ memory_mib = {CARD_MIB}, compute_capability = "{capability}" }}',
        f"targets = {json.dumps(list(targets))}",
        *(["portable = true"] if portable else []),
    ]
    texts = {"classify": "reviews", "embed": "reviews", "rerank": "ranking"}
    loose = {
        "classify": {"min_agreement": 0.0, "max_accuracy_loss": 1.0},
        "embed": {"min_mean_cosine": 0.0, "min_cosine": 0.0, "min_spearman": 0.0},
        "rerank": {"min_spearman": 0.0, "max_ndcg_loss": 1.0},
    }
    for name, task in ENCODERS.items():
        data = texts[task]
        lines += [
            f"\n[models.{name}]",
            f'task = "{task}"',
            f'source = "./models/{name}"',
            f"precisions = {json.dumps(list(sizes.encoder_precisions))}",
            f"max_batch = {sizes.max_batch}",
            f"max_length = {sizes.max_length}",
            f'evaluation = "texts/{data}.evaluation.jsonl"',
            f'calibration = {{ data = "bundled:{data}:calibration", samples = {_CALIBRATED} }}',
            f"gates = {_inline({**loose[task], 'min_fp16_cosine': 0.99})}",
        ]
    lines += [
        f"\n[models.{LLM}]",
        'task = "generate"',
        f'source = "./models/{LLM}"',
        f"precisions = {json.dumps(list(sizes.llm_precisions))}",
        f"slots = {sizes.slots}",
        f"max_length = {sizes.capacity}",
        f"prefill_chunk = {sizes.chunk}",
        'evaluation = "texts/conversations.evaluation.jsonl"',
        f'calibration = {{ data = "bundled:conversations:calibration", samples = {_CONVERSATIONS} }}',
        "gates = { max_perplexity_increase = 1.0 }",
    ]
    return "\n".join(lines) + "\n"


def _inline(table: dict[str, float]) -> str:
    return "{ " + ", ".join(f"{key} = {value}" for key, value in table.items()) + " }"


def _write_texts(folder: Path) -> None:
    """The first lines of the bundled texts."""
    folder.mkdir(exist_ok=True)
    for name, lines in (("reviews", _EVALUATED), ("ranking", _GROUPS), ("conversations", _CONVERSATIONS)):
        source = data_file(f"bundled:{name}:evaluation").read_text("utf-8").splitlines(keepends=True)
        step = max(1, len(source) // lines)  # from the whole file: some of each label
        (folder / f"{name}.evaluation.jsonl").write_text("".join(source[::step][:lines]), encoding="utf-8")


def write_encoder(folder: Path, task: str, size: EncoderSize) -> None:
    """A BERT checkpoint with random weights and a WordPiece tokenizer of the bundled texts.

    A folder that has its config and weights is kept when they are of this size.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    labels = {"classify": _LABELS, "rerank": ("score",)}.get(task, ())
    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn,
        max_position_embeddings=size.positions,
        # So that Linears keep the size of what they read, as those of trained models do.
        initializer_range=size.hidden**-0.5,
        id2label=dict(enumerate(labels)) or None,
        label2id={label: index for index, label in enumerate(labels)} or None,
    )
    mark = folder / "size.json"
    wanted = json.dumps([task, repr(size)])
    if mark.is_file() and mark.read_text("utf-8") == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model: Any = (
        BertForSequenceClassification(config) if labels else BertModel(config, add_pooling_layer=False)
    )
    model.save_pretrained(folder)
    _write_tokenizer(folder, size.vocabulary)
    mark.write_text(wanted, encoding="utf-8")


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [review.text for review in load_texts("bundled:reviews:train")]
    for group in load_groups("bundled:ranking:train"):
        texts += [group.query, *group.passages]
    trainer = trainers.WordPieceTrainer(
        vocab_size=min(vocabulary, 8000), special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "BertTokenizerFast",
        "do_lower_case": True,
        "strip_accents": False,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
