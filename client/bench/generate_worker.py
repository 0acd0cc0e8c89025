"""The generating baseline's worker: Transformers' generate in process, and what else needs torch or onnx.

Run as `python -m client.bench.generate_worker`; jobs come and go as in `worker`, each in a fork. Best honest
form: all cores, inference mode, warmed up, key-value cache, the checkpoint's own attention; a batch is left
padded and as long as its longest prompt, and runs until every row has its tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .machine import resident_mib
from .worker import serve, set_precision

SOME_WORDS = (
    "the soup was cold and came late but staff were kind 국물이 정말 맛있고 배송도 빨랐어요 다시 갈게요"
)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job, by its `kind`."""
    return {"generate": _generate, "texts": _texts, "bandwidth": _bandwidth, "weights": _weights}[
        job["kind"]
    ](job)


def _generate(job: dict[str, Any]) -> dict[str, Any]:
    """Rates and first-token times for every batch size in `batches`, over `prompts`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    model = AutoModelForCausalLM.from_pretrained(job["source"]).eval()
    set_precision(model, job["precision"])
    rows = [_ids(tokenizer, messages, text) for messages, text in job["prompts"]]
    points: dict[str, Any] = {}
    deadline = time.perf_counter() + job["limit"]
    with torch.inference_mode():
        for batch in job["batches"]:
            call = Batches(model, rows, batch, job["new_tokens"])
            call.warm_up()
            if time.perf_counter() > deadline and points:
                break
            points[str(batch)] = call.measure(job["seconds"])
    return {"points": points, "memory_mib": resident_mib()}


def _ids(tokenizer: Any, messages: Sequence[Any], text: str) -> list[int]:
    if messages:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(ids)
    return list(tokenizer(text)["input_ids"])


class Batches:
    """Static batches of `size` prompts, round and round."""

    def __init__(self, model: Any, rows: Sequence[list[int]], size: int, new_tokens: int) -> None:
        self._model, self._rows, self._size, self._new = model, rows, size, new_tokens
        self._next = 0

    def warm_up(self) -> None:
        self._run(2)

    def measure(self, seconds: float) -> dict[str, float]:
        """Whole batches for at least `seconds`; the first token is the whole batch's."""
        firsts: list[float] = []
        lasts: list[float] = []
        tokens = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not firsts:
            began = time.perf_counter()
            times = self._run(self._new)
            firsts.append(times[0] - began)
            lasts.append(times[-1] - times[0])
            tokens += self._size * self._new
        decoded = self._size * (self._new - 1) * len(lasts)
        return {
            "tokens_per_s": tokens / elapsed,
            "decode_tokens_per_s": decoded / max(sum(lasts), 1e-9),
            "first_token_ms": sorted(firsts)[len(firsts) // 2] * 1e3,
        }

    def _run(self, new_tokens: int) -> list[float]:
        """Times at which each step's tokens were there."""
        import torch
        from transformers import StoppingCriteriaList

        rows = [self._rows[(self._next + place) % len(self._rows)] for place in range(self._size)]
        self._next += self._size
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        times: list[float] = []

        def note(*_: Any, **__: Any) -> Any:  # asked after every step, for any batch size
            times.append(time.perf_counter())
            return torch.zeros(self._size, dtype=torch.bool)

        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([note]),
        )
        return times


def _texts(job: dict[str, Any]) -> dict[str, Any]:
    """For each of `wanted`, count texts with so many tokens behind `before`, or as near below as can be."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    words = sorted(set(" ".join([*job["words"], SOME_WORDS]).split()))
    costs = {word: len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in words}

    def measure(text: str) -> int:
        return len(tokenizer(job["before"] + text)["input_ids"])

    draw = random.Random(0)
    return {
        "texts": [
            [_text_of(tokens, costs, measure, draw) for _ in range(count)] for tokens, count in job["wanted"]
        ]
    }


def _text_of(tokens: int, costs: dict[str, int], measure: Callable[[str], int], draw: random.Random) -> str:
    words = list(costs)
    chosen = [draw.choice(words)]
    while (left := tokens - measure(" ".join(chosen))) > 0:
        # Nearly there, only words that still fit; far from it, as many as surely do.
        fitting = [word for word in words if costs[word] <= left]
        if not fitting:
            break
        while left > 0 and fitting:
            word = draw.choice(fitting)
            chosen.append(word)
            left -= costs[word]
            fitting = [word for word in words if costs[word] <= left]
    while len(chosen) > 1 and measure(" ".join(chosen)) > tokens:
        chosen.pop()
    return " ".join(chosen)


def _bandwidth(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes per second that all threads together read from memory: the fastest pass over a large buffer."""
    import torch

    torch.set_num_threads(job["threads"])
    size = 2**30 if _available_bytes() > 4 * 2**30 else 2**28
    buffer = torch.ones(size // 8, dtype=torch.int64)
    best, end = float("inf"), time.perf_counter() + job["seconds"]
    while time.perf_counter() < end:
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return {"bytes_per_s": size / best, "buffer_bytes": size}


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _weights(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes of weights that a decode step reads: the graph's, without tables of which it takes rows.

    None for an engine that is no ONNX graph, or without the onnx package.
    """
    path = Path(job["engine"])
    if path.suffix != ".onnx":
        return {"bytes": None}
    try:
        import onnx
    except ImportError:
        return {"bytes": None}
    graph = onnx.load(str(path), load_external_data=False).graph
    rows_only = {
        name
        for node in graph.node
        for name in (
            node.input[:1]
            if node.op_type.startswith("Gather")
            else node.input[7:9]  # the rotary tables
            if node.op_type == "GroupQueryAttention"
            else ()
        )
    }
    total = 0
    for tensor in graph.initializer:
        if tensor.name not in rows_only:
            total += _tensor_bytes(tensor)
    return {"bytes": total}


def _tensor_bytes(tensor: Any) -> int:
    import math

    import onnx

    external = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in external:
        return int(external["length"])
    bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}.get(tensor.data_type)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims) * bits // 8)


if __name__ == "__main__":
    serve(run, ("torch", "transformers"))
