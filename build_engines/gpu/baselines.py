"""The baseline: Transformers in FP16 with fused attention, as it is and compiled by torch.compile.

In its best honest form: full rows without padding, weights and inputs on the GPU, no gradient, warmed up;
compiled with CUDA graphs for each shape, and an LLM with a cache of just the length that the run needs. Runs
in a side process of its own; `device` is "cuda", or "cpu" where the code itself is tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from build_engines.gpu.ceilings import usable_torch
from build_engines.gpu.results import Failed, said
from build_engines.gpu.timing import Run, encoder_arrays, prompts, timed_runs

EAGER: Final = "torch fp16"
COMPILED: Final = "torch fp16 compiled"
# The first captures CUDA graphs, which some operators and drivers do not allow.
_MODES: Final = ("reduce-overhead", "default")

# In the side process: what it has loaded.
_loaded: dict[str, Any] = {}


def load_encoder(folder: Path, task: str, device: str) -> int:
    """Load the checkpoint as its task uses it; returns the GPU bytes that PyTorch holds for it."""
    torch = usable_torch(device)
    _quiet()
    free()
    _loaded["device"] = device
    from transformers import AutoModel, AutoModelForSequenceClassification

    kind = AutoModel if task == "embed" else AutoModelForSequenceClassification
    encoder = kind.from_pretrained(
        folder, dtype=torch.float16, attn_implementation="sdpa", local_files_only=True
    )
    encoder = encoder.to(device).eval()
    _loaded["forward"] = _forward(torch, encoder, task)
    _loaded["inputs"] = ["input_ids", "attention_mask", *(["token_type_ids"] if task == "rerank" else [])]
    _loaded["vocabulary"] = encoder.config.vocab_size
    return int(torch.cuda.memory_allocated()) if device == "cuda" else 0


def _forward(torch: Any, encoder: Any, task: str) -> Callable[..., Any]:
    """From ids to the task's answer, as the engine's graph computes it."""

    def classify(**inputs: Any) -> Any:
        return torch.softmax(encoder(**inputs).logits, dim=-1)

    def rerank(**inputs: Any) -> Any:
        return torch.sigmoid(encoder(**inputs).logits[:, 0])

    def embed(**inputs: Any) -> Any:
        hidden = encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    return {"classify": classify, "rerank": rerank, "embed": embed}[task]


def compile_encoder(shape: tuple[int, int]) -> str:
    """Compile for one shape and run it; returns the mode that works. Raises Failed with every reason."""
    torch = _torch()
    reasons = []
    for mode in _modes():
        _loaded["compiled"] = torch.compile(_loaded["forward"], mode=mode, dynamic=False)
        try:
            for _ in range(3):
                _encoder_run(COMPILED, "device", shape)()
        except Exception as error:  # no C compiler, no kernel, no graph: anything
            reasons.append(f"{mode}: {said(error)}")
            _loaded.pop("compiled")
            torch._dynamo.reset()
        else:
            return mode
    raise Failed("; ".join(reasons))


def time_encoder(contender: str, way: str, shape: tuple[int, int], seconds: float) -> list[float]:
    """Seconds of each run at `shape`; `way` "device" leaves inputs and answer on the GPU, "host" does not."""
    return timed_runs(_encoder_run(contender, way, shape), seconds)


def _encoder_run(contender: str, way: str, shape: tuple[int, int]) -> Run:
    torch, device = _torch(), _loaded["device"]
    forward = _loaded["compiled" if contender == COMPILED else "forward"]
    arrays = encoder_arrays(_loaded["inputs"], *shape, _loaded["vocabulary"])
    host = {name: torch.from_numpy(array) for name, array in arrays.items()}
    there = {name: tensor.to(device) for name, tensor in host.items()}

    def run() -> object:
        torch.compiler.cudagraph_mark_step_begin()  # the answer before this one may be overwritten
        with torch.no_grad():
            if way == "host":
                given = {name: tensor.to(device) for name, tensor in host.items()}
                return forward(**given).float().cpu().numpy()
            answer = forward(**there)
        if device == "cuda":
            torch.cuda.synchronize()
        return answer

    return run


# --- LLM --------------------------------------------------------------------------------------------------


def load_llm(folder: Path, device: str) -> int:
    """Load the causal LM; returns the GPU bytes that PyTorch holds for it."""
    torch = usable_torch(device)
    _quiet()
    free()
    _loaded["device"] = device
    from transformers import AutoModelForCausalLM

    lm: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, attn_implementation="sdpa", local_files_only=True
    )
    _loaded["lm"] = lm.to(device).eval()
    return int(torch.cuda.memory_allocated()) if device == "cuda" else 0


def time_prompt(contender: str, length: int, seconds: float) -> list[float]:
    """Seconds from a prompt on the GPU to its first token on the host, one sequence; eager."""
    del contender
    torch, lm = _torch(), _loaded["lm"]
    ids = torch.from_numpy(prompts(1, length, lm.config.vocab_size)).to(_loaded["device"])

    def run() -> object:
        with torch.no_grad():
            return lm(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    return timed_runs(run, seconds)


def compile_llm(batch: int, prompt: int, new: int) -> str:
    """Compile the decode step for a batch and run a few; returns the mode that works. Raises Failed."""
    torch = _torch()
    reasons = []
    for mode in _modes():
        _loaded[f"step {batch}"] = torch.compile(_step, mode=mode, dynamic=False)
        try:
            _decode(COMPILED, batch, (prompt, new), min(new, 4), to_host=True)
        except Exception as error:  # as in compile_encoder
            reasons.append(f"{mode}: {said(error)}")
            for kind in ("step", "cache"):
                _loaded.pop(f"{kind} {batch}", None)
            torch._dynamo.reset()
        else:
            return mode
    raise Failed("; ".join(reasons))


def time_decode(contender: str, way: str, batch: int, prompt: int, new: int) -> list[float]:
    """Seconds of each of `new` greedy steps after prompts of one length; "host": each token reaches it."""
    return _decode(contender, batch, (prompt, new), new, to_host=way == "host")


def _decode(
    contender: str, batch: int, lengths: tuple[int, int], steps: int, *, to_host: bool
) -> list[float]:
    """`steps` steps with a cache that holds a prompt and so many new tokens as `lengths` say."""
    from transformers import DynamicCache

    torch, lm = _torch(), _loaded["lm"]
    prompt, new = lengths
    ids = torch.from_numpy(prompts(batch, prompt, lm.config.vocab_size)).to(_loaded["device"])
    compiled = contender == COMPILED
    cache = _static_cache(lm, batch, prompt + new + 1) if compiled else DynamicCache(config=lm.config)
    step = _loaded[f"step {batch}"] if compiled else _step
    times = []
    with torch.no_grad():
        token = lm(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        token.tolist()
        for _ in range(steps):
            started = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            # A copy: the graph's own output is overwritten by its next run.
            token = step(lm, token, cache).clone()
            if to_host:
                token.tolist()
            elif _loaded["device"] == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return times


def _step(lm: Any, token: Any, cache: Any) -> Any:
    return lm(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def _static_cache(lm: Any, batch: int, length: int) -> Any:
    """One for each batch size, kept: a compiled graph is tied to its addresses."""
    from transformers import StaticCache

    key = f"cache {batch}"
    if key not in _loaded:
        _loaded[key] = StaticCache(config=lm.config, max_cache_len=length)
    _loaded[key].reset()
    return _loaded[key]


def free() -> None:
    """Forget what was loaded and give its memory back."""
    import gc

    import torch

    on_gpu = _loaded.get("device") == "cuda"
    compiled = any(name.startswith(("compiled", "step")) for name in _loaded)
    _loaded.clear()
    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def _torch() -> Any:
    return usable_torch(_loaded["device"])


def _modes() -> tuple[str, ...]:
    return _MODES if _loaded["device"] == "cuda" else ("default",)


def _quiet() -> None:
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
