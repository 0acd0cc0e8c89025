"""What a stack file says, as frozen dataclasses; `build_engines.stack` fills and re-exports them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from build_engines.cards import Card

Task = Literal["classify", "embed", "rerank", "generate"]
Precision = Literal["int8", "int8-weights", "fp16", "fp32", "fp8", "nvfp4", "int4-awq"]
Target = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
Overflow = Literal["truncate", "refuse"]
Pooling = Literal["mean", "cls"]
CalibrationMethod = Literal["minmax", "percentile", "entropy"]
Smoothing = Literal["auto", "off"]
Family = Literal["bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert"]
# SOLAR and EEVE are `llama` by their config.json; `exaone` is 3.x, `exaone4` what Transformers calls so.
DecoderFamily = Literal["llama", "mistral", "qwen2", "qwen3", "exaone", "exaone4", "gemma2", "gemma3_text"]
TableType = Literal["fp16", "int8"]

TASKS: Final = get_args(Task)
# Of models that are compiled here; the others are TensorRT-LLM's.
PRECISIONS: Final = ("int8", "int8-weights", "fp16", "fp32")
TARGETS: Final = get_args(Target)
OVERFLOWS: Final = get_args(Overflow)
POOLINGS: Final = get_args(Pooling)
METHODS: Final = get_args(CalibrationMethod)
SMOOTHINGS: Final = get_args(Smoothing)
FAMILIES: Final = get_args(Family)
DECODER_FAMILIES: Final = get_args(DecoderFamily)
# What an LLM can be compiled to. INT8 activations (`int8`) are for encoders.
GENERATE_PRECISIONS: Final = ("int8-weights", "fp16", "fp32")
TABLE_TYPES: Final = get_args(TableType)
# What a checkpoint that TensorRT-LLM serves can be stored as, and the compute capabilities that its hardware
# matrix has kernels for.
LLM_CAPABILITIES: Final[dict[str, tuple[str, ...]]] = {
    "fp16": ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"),
    "fp8": ("8.9", "9.0", "10.0", "10.3", "12.0"),
    "nvfp4": ("10.0", "10.3", "12.0"),
    "int4-awq": ("8.0", "8.6", "8.9", "9.0"),
}
# Bundled sets by the tasks that can read them: groups of passages, (labelled) texts, or conversations.
BUNDLED_SETS: Final = {
    "classify": "reviews",
    "embed": "reviews",
    "rerank": "ranking",
    "generate": "conversations",
}
BUNDLED_SPLITS: Final = ("train", "calibration", "evaluation")
DATA_SUFFIXES: Final = (".jsonl", ".csv", ".txt")
MAX_MODELS: Final = 64
# Rows of the rotary tables that an exported LLM carries, at most: 32 MB in FP32 for heads of 128.
MAX_CAPACITY: Final = 32_768
MAX_SLOTS: Final = 256
# The driver keeps about 400 MiB of a GeForce card for itself, and a desktop takes about 350 (docs/plan.md).
DEFAULT_RESERVE_MIB: Final = 768
# Every engine instance is a process of its own, with its own CUDA context.
DEFAULT_CONTEXT_MIB: Final = 300


def compiles(target: str, task: Task, precision: Precision) -> bool:
    """Whether `target` has engines of a task's models in this precision; the other engines are left out.

    FP32 attention is fused by no TensorRT, and by ONNX Runtime on the GPU in encoders alone. INT8 it has no
    kernels for there.
    """
    if target == "onnxruntime-cuda":
        return precision == "fp16" or (precision == "fp32" and task != "generate")
    return target == "onnxruntime" or precision != "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRef:
    """Where texts come from. `path` is None for bundled data ("bundled:<set>:<split>")."""

    spec: str
    path: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How activation ranges are found. `percentile`: share of |activation| kept, in percent."""

    data: DataRef | None = None
    samples: int = 256
    method: CalibrationMethod = "minmax"
    percentile: float = 99.99
    smoothing: Smoothing = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Accuracy limits against PyTorch FP32; None where the model's task has no such measure."""

    min_mean_cosine: float | None = None
    min_cosine: float | None = None
    min_spearman: float | None = None
    min_agreement: float | None = None
    max_accuracy_loss: float | None = None
    max_ndcg_loss: float | None = None
    min_fp16_cosine: float | None = None
    max_perplexity_increase: float | None = None


DEFAULT_GATES: Final[dict[str, dict[str, float]]] = {
    "embed": {
        "min_mean_cosine": 0.995,
        "min_cosine": 0.98,
        "min_spearman": 0.99,
        "min_fp16_cosine": 0.9999,
    },
    "classify": {"min_agreement": 0.99, "max_accuracy_loss": 0.01, "min_fp16_cosine": 0.9999},
    "rerank": {"min_spearman": 0.99, "max_ndcg_loss": 0.01, "min_fp16_cosine": 0.9999},
    # Relative: 0.01 lets the perplexity rise by 1%.
    "generate": {"max_perplexity_increase": 0.01},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What may wait for one model, in a queue of the served model's own.

    `max_size` requests at most; from arrival to the answer (of an LLM to its first token) `deadline_ms`: a
    request that is not going to make it is rejected. Priorities run from 1 (first) to `priority_levels`.
    `max_delay_us`: how long an encoder waits for more requests to run together.
    """

    max_size: int = 1024
    deadline_ms: int = 10_000
    max_delay_us: int = 0
    priority_levels: int = 3
    default_priority: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that decide an encoder's memory. `ffn`: inner width (of one branch where the FFN is gated).

    `embedding`: width of the embedding tables (ELECTRA's may be smaller than `hidden`).
    `positions`: tokens that a text can have: rows of the position table, or of ModernBERT's rotary tables.
    """

    family: Family
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    embedding: int
    positions: int
    token_types: int
    labels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The sizes that decide an LLM's memory. `ffn`: width of one of the two branches of the gated FFN.

    `kv_heads`: heads of key and value, which `heads` share in groups. `positions`: tokens that a sequence
    can have. `tied`: the checkpoint's output projection is its embedding table.

    Of a checkpoint that TensorRT-LLM serves: `cache_bytes` of one key or value, and `stored_bytes` of all its
    tensors (0: not there yet).
    """

    family: DecoderFamily
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    tied: bool = False
    qkv_bias: bool = False
    cache_bytes: int = 2
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model of the stack. `source_dir` is the checkpoint's folder, or None when `source` is a hub id.

    Of `generate` models only: `slots` sequences run at once, each of at most `max_length` tokens (prompt and
    answer together); 0 leaves either open until `build_engines.plan.resolve_open` has chosen. A prompt is
    read in steps of `prefill_chunk` tokens. `embedding` and `head` are the stored types of the two tables
    in `int8-weights`. `target`: "tensorrt-llm" serves the checkpoint as it is stored, which `precisions` then
    names; None: the stack's targets.
    """

    name: str
    task: Task
    target: Literal["tensorrt-llm"] | None = None
    source: str
    source_dir: Path | None = None
    revision: str | None = None
    precisions: tuple[Precision, ...] = ("int8", "fp16")
    max_batch: int = 64
    max_length: int = 256
    overflow: Overflow = "truncate"
    pooling: Pooling | None = None
    normalize: bool = True
    shape: ModelShape | DecoderShape | None = None
    allow_pickle: bool = False
    allow_remote_code: bool = False
    calibration: Calibration = Calibration()
    evaluation: DataRef | None = None
    gates: Gates = Gates()
    queue: Queue = Queue()
    cache: bool = False
    instances: int = 1
    slots: int = 0
    prefill_chunk: int = 128
    embedding: TableType = "fp16"
    head: TableType = "int8"

    @property
    def is_open(self) -> bool:
        """Whether an LLM's slots or length are still to be chosen."""
        return self.task == "generate" and not (self.slots and self.max_length)

    @property
    def variants(self) -> dict[Precision, str]:
        """Precision to Triton model name: the first precision answers to the plain name."""
        first, *others = self.precisions
        return {first: self.name} | {precision: f"{self.name}-{precision}" for precision in others}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A whole stack file. `path` is the file; `build_dir` is where every stage writes.

    `reserve_mib`: what the driver and a desktop take of the card; `context_mib`: one process's CUDA context.
    `portable`: TensorRT-RTX engines run on every card from compute capability 8.0 on, not on `card` alone.
    """

    name: str
    path: Path
    card: Card
    targets: tuple[Target, ...]
    models: dict[str, Model]
    reserve_mib: int
    context_mib: int = DEFAULT_CONTEXT_MIB
    portable: bool = False
    build_dir: Path

    def checkpoint_dir(self, model: Model) -> Path:
        """The checkpoint's folder: the user's own, or where `fetch` puts what it downloads or converts."""
        fetched = self.fetched_dir(model.name)
        if model.source_dir is None or (model.allow_pickle and fetched.is_dir()):
            return fetched
        return model.source_dir

    def fetched_dir(self, name: str) -> Path:
        """Where `fetch` puts what it downloads or converts for the model called `name`."""
        return self.build_dir / "sources" / name
