"""Stack files: whatever the bytes are, a Stack or a StackError, and of its plan a Plan or a PlanError."""

from __future__ import annotations

from pathlib import Path

import draw

from build_engines.errors import PlanError, StackError
from build_engines.plan import plan_stack, render_plan
from build_engines.stack import load_stack

INSTRUMENT = ("tomllib",)
_STACKS = sorted((Path(__file__).parents[2] / "stacks").glob("*.toml"))
_SHAPED = b"""card = { memory_mib = 16303, compute_capability = "12.0" }
targets = ["tensorrt-rtx", "onnxruntime"]
portable = true
[models.a]
task = "classify"
source = "owner/name"
precisions = ["int8", "fp16"]
calibration = { data = "bundled:reviews:calibration", samples = 9, method = "entropy", percentile = 99.9 }
gates = { agreement = 0.99 }
queue = { max_size = 3, priority_levels = 2, default_priority = 1 }
[models.a.shape]
family = "bert"
layers = 12
hidden = 768
ffn = 3072
heads = 12
vocabulary = 30000
positions = 512
token_types = 2
labels = 3
[models.b]
task = "generate"
source = "owner/llm"
precisions = ["int8-weights"]
slots = 4
max_length = 2048
[models.b.shape]
family = "llama"
layers = 16
hidden = 2048
ffn = 8192
heads = 32
kv_heads = 8
head_dim = 64
vocabulary = 128256
positions = 8192
tied = true
"""
SEEDS = [*(path.read_bytes() for path in _STACKS), _SHAPED]
WORDS = [
    *(b"[models.", b"[[", b"]", b"= ", b'"""', b"'''", b"#", b"\n", b"{", b"}", b"true", b"nan", b"-inf"),
    *(b"0x", b"1e999", b"99999999999999999999", b"1979-05-27T07:32:00Z", b"\xef\xbb\xbf", b"\x00", b"\r"),
    *(b"task", b"source", b"precisions", b"target", b"shape", b"queue", b"calibration", b"evaluation"),
    *(b"../", b"/etc/passwd", b"bundled:reviews:evaluation", b"a.b.c.", b'"".', b"\\u0000", b"\\U0010ffff"),
]


def target(data: bytes) -> None:
    with draw.folder() as folder:
        path = folder / "stack.toml"
        path.write_bytes(data)
        try:
            stack = load_stack(path)
        except StackError as error:
            assert str(error)
            return
        try:
            render_plan(plan_stack(stack))
        except PlanError as error:
            assert str(error)
