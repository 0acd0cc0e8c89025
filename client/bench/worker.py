"""The baseline worker: Transformers in process, in its best honest form.

Run as `python -m client.bench.worker`: jobs come as JSON lines on standard input, results leave on standard
output. Each job runs in a fork, so that its memory is that of one model in one precision alone.

Best honest form: all cores, inference mode, warmed up; batches of 32 sorted by length before they are cut, as
sentence-transformers does, so that little padding is computed; the fast tokenizer inside the measured time,
as the server tokenizes too. The embedder is sentence-transformers itself.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .machine import resident_mib

BATCH = 32
WARM_UP_RUNS = 2

Row = str | tuple[str, str]  # a text, or a query with one passage


class Embedder:
    """sentence-transformers, with the served model's length and, for a bare checkpoint, its pooling."""

    labels: tuple[str, ...] = ()

    def __init__(self, job: dict[str, Any]) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        source = job["source"]
        if os.path.exists(os.path.join(source, "modules.json")):
            self.model = SentenceTransformer(source, device="cpu")
        else:
            parts = [Transformer(source)]
            parts.append(Pooling(parts[0].get_embedding_dimension(), pooling_mode=job["pooling"] or "mean"))
            parts += [Normalize()] if job["normalize"] else []
            self.model = SentenceTransformer(modules=parts, device="cpu")
        self.model.max_seq_length = job["max_length"]
        self.tokenizer = self.model.tokenizer
        set_precision(self.model, job["precision"])

    def one(self, item: Any) -> Any:
        return self.model.encode([item[0]], batch_size=1, show_progress_bar=False)

    def many(self, items: Sequence[Any]) -> Any:
        texts = [item[0] for item in items]
        return self.model.encode(texts, batch_size=BATCH, show_progress_bar=False)  # sorts by length itself

    def values(self, items: Sequence[Any]) -> Any:
        return np.asarray(self.many(items), np.float32)


class SequenceClassifier:
    """AutoModelForSequenceClassification, for labels (texts) and for scores (query and passage pairs)."""

    def __init__(self, job: dict[str, Any]) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.rerank = job["task"] == "rerank"
        self.max_length = job["max_length"]
        self.tokenizer = AutoTokenizer.from_pretrained(job["source"])
        self.model = AutoModelForSequenceClassification.from_pretrained(job["source"]).eval()
        set_precision(self.model, job["precision"])
        names = self.model.config.id2label
        self.labels = tuple(names[key] for key in sorted(names))

    def one(self, item: Any) -> Any:
        return self._forward(self._rows([item]))

    def many(self, items: Sequence[Any]) -> Any:
        rows = self._rows(items)
        order = sorted(range(len(rows)), key=lambda place: -_length(rows[place]))
        logits: list[Any] = [None] * len(rows)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            for place, row in zip(places, self._forward([rows[p] for p in places]), strict=True):
                logits[place] = row
        return np.stack(logits)

    def values(self, items: Sequence[Any]) -> Any:
        logits = self.many(items)
        return 1 / (1 + np.exp(-logits[:, 0])) if self.rerank else logits.argmax(axis=1)

    def _rows(self, items: Sequence[Any]) -> list[Row]:
        if self.rerank:
            return [(query, passage) for query, passages in items for passage in passages]
        return [text for text, _ in items]

    def _forward(self, rows: Sequence[Row]) -> Any:
        columns = list(zip(*rows, strict=True)) if self.rerank else [rows]
        inputs = self.tokenizer(
            *map(list, columns),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        if getattr(self.model.config, "type_vocab_size", None) == 1:
            # A BERT tokenizer with a RoBERTa model numbers the second text 1, a type that the model lacks.
            inputs.pop("token_type_ids", None)
        return self.model(**inputs).logits.float().numpy()


def set_precision(model: Any, precision: str) -> None:
    import torch

    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)


def _length(row: Any) -> int:
    return len(row) if isinstance(row, str) else sum(map(len, row))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job: `pool` asks for speeds, `all` for answers and token counts."""
    import torch

    torch.set_num_threads(job["threads"])
    with torch.inference_mode():
        model = Embedder(job) if job["task"] == "embed" else SequenceClassifier(job)
        if "all" in job:
            items = job["all"]
            np.savez(job["out"], values=model.values(items), tokens=_token_counts(model, items))
            return {"labels": model.labels}
        return _speeds(model, job["pool"], job["seconds"])


def _speeds(model: Embedder | SequenceClassifier, pool: Sequence[Any], seconds: float) -> dict[str, Any]:
    one = _rate(model.one, pool, seconds)
    model.many(pool[:BATCH])
    many = _rate(model.many, [pool], seconds)
    return {"one_by_one_per_s": one, "batch32_per_s": many, "memory_mib": resident_mib()}


def _rate(call: Callable[[Any], Any], calls: Sequence[Any], seconds: float) -> float:
    """Units per second, over whole calls, for at least `seconds`."""
    for argument in calls[:WARM_UP_RUNS] if len(calls) > 1 else ():
        call(argument)
    done, place = 0, 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not done:
        argument = calls[place % len(calls)]
        call(argument)
        done += _units(argument)
        place += 1
    return done / elapsed


def _units(argument: Any) -> int:
    """Texts in a call, or passages: an item is [text, passages], a batch a list of items."""
    if isinstance(argument[0], str):
        return len(argument[1]) or 1
    return sum(_units(item) for item in argument)


def _token_counts(model: Embedder | SequenceClassifier, items: Sequence[Any]) -> Any:
    counts = []
    for text, passages in items:
        columns = ([text] * len(passages), passages) if passages else ([text],)
        counts += [
            len(ids) for ids in model.tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        ]
    return np.array(counts, np.int64)


def _in_fork(run_job: Callable[[dict[str, Any]], dict[str, Any]], job: dict[str, Any], results: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            try:
                result = run_job(job)
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
            os.write(results, (json.dumps(result) + "\n").encode())
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        reason = f"ended with signal {os.waitstatus_to_exitcode(status)}; out of memory?"
        os.write(results, (json.dumps({"error": reason}) + "\n").encode())


def serve(run_job: Callable[[dict[str, Any]], dict[str, Any]], libraries: Sequence[str]) -> None:
    """Run each job that standard input brings in a fork; the libraries are loaded before, once."""
    results = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not reach the results
    for library in libraries:
        importlib.import_module(library)
    for line in sys.stdin:
        _in_fork(run_job, json.loads(line), results)


if __name__ == "__main__":
    serve(run, ("sentence_transformers", "torch", "transformers"))
