"""Fine-tuning of the demo models: plain PyTorch on the CPU, the same weights on every run of one machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build_engines.metrics import accuracy, ndcg_at_k
from build_engines.training import has_bfloat16
from calibration.samples import RankingGroup, load_groups, load_texts

if TYPE_CHECKING:
    import torch

__all__ = [
    "LABELS",
    "TASKS",
    "Classification",
    "Recipe",
    "Reranking",
    "fine_tune",
]

LABELS = ("negative", "positive")
_SERVED_LENGTH = 256
# Parts of the network that start from less than the encoder does may move faster.
_FASTER = {"classifier.": 10.0, "pooler.": 3.0, "word_embeddings.": 4.0}

Batch = list[tuple[list[int], list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model is fine-tuned; `batch` counts reviews or ranking groups, `max_length` tokens."""

    epochs: int
    batch: int
    learning_rate: float
    max_length: int
    minimum: float
    seed: int = 20261120
    max_steps: int | None = None


def fine_tune(model: Any, task: Classification | Reranking, report: Callable[[float], None]) -> None:
    """Train `model` in place with AdamW: linear warm-up over a tenth of the steps, then linear decay.

    `report` gets the share of the steps done, 0 to 1. Call it inside `training.reproducible`.
    """
    import torch

    recipe = task.recipe
    groups = _parameter_groups(model, recipe.learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = [batch for epoch in range(recipe.epochs) for batch in task.batches(epoch)][: recipe.max_steps]
    # Not train(): drawing dropout masks costs a fifth of the time on a CPU and gains nothing here.
    model.eval()
    for step, batch in enumerate(batches):
        scale = min(1.0, (step + 1) / (0.1 * len(batches))) * (1.0 - step / len(batches))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            logits = _logits(model, task.encoded(batch))
        task.loss(logits.float(), batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report((step + 1) / len(batches))


class Classification:
    """Reviews into `LABELS`, by cross entropy."""

    def __init__(self, tokenizer: Any, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.reviews = load_texts("bundled:reviews:train", labels=LABELS)
        self.ids = [
            e.ids[: recipe.max_length] for e in tokenizer.encode_batch([r.text for r in self.reviews])
        ]

    def batches(self, epoch: int) -> list[list[int]]:
        return _similar_lengths([len(ids) for ids in self.ids], self.recipe.batch, self.recipe.seed + epoch)

    def encoded(self, batch: list[int]) -> Batch:
        return [(self.ids[i], [0] * len(self.ids[i])) for i in batch]

    def loss(self, logits: torch.Tensor, batch: list[int]) -> torch.Tensor:
        import torch

        labels = torch.tensor([LABELS.index(self.reviews[i].label or "") for i in batch])
        return torch.nn.functional.cross_entropy(logits, labels)

    def quality(self, model: Any) -> dict[str, float]:
        held_out = load_texts("bundled:reviews:evaluation", labels=LABELS)
        encodings = self.tokenizer.encode_batch([review.text for review in held_out])
        logits = _predict(model, [(e.ids, e.type_ids) for e in encodings])
        predicted = [LABELS[max(range(len(row)), key=row.__getitem__)] for row in logits]
        return {"accuracy": accuracy(predicted, [review.label for review in held_out])}


class Reranking:
    """Passages of one query against each other, and each for itself so that its sigmoid means something."""

    def __init__(self, tokenizer: Any, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.groups = load_groups("bundled:ranking:train")
        self.pairs = [self._pairs(group, recipe.max_length) for group in self.groups]

    def _pairs(self, group: RankingGroup, max_length: int) -> Batch:
        encodings = self.tokenizer.encode_batch([(group.query, passage) for passage in group.passages])
        return [(e.ids[:max_length], e.type_ids[:max_length]) for e in encodings]

    def batches(self, epoch: int) -> list[list[int]]:
        lengths = [max(len(ids) for ids, _ in pairs) for pairs in self.pairs]
        return _similar_lengths(lengths, self.recipe.batch, self.recipe.seed + epoch)

    def encoded(self, batch: list[int]) -> Batch:
        return [pair for i in batch for pair in self.pairs[i]]

    def loss(self, logits: torch.Tensor, batch: list[int]) -> torch.Tensor:
        import torch

        losses = []
        sizes = [len(self.pairs[i]) for i in batch]
        for i, scores in zip(batch, logits[:, 0].split(sizes), strict=True):
            grades = torch.tensor(self.groups[i].relevance)
            gains = torch.exp2(grades) - 1.0
            listwise = -(gains / gains.sum() * torch.log_softmax(scores, 0)).sum()
            pointwise = torch.nn.functional.binary_cross_entropy_with_logits(scores, grades / 2.0)
            losses.append(listwise + pointwise)
        return torch.stack(losses).mean()

    def quality(self, model: Any) -> dict[str, float]:
        held_out = load_groups("bundled:ranking:evaluation")
        encoded = [self._pairs(group, _SERVED_LENGTH) for group in held_out]
        scores = [row[0] for row in _predict(model, [pair for pairs in encoded for pair in pairs])]
        values, start = [], 0
        for group in held_out:
            end = start + len(group.passages)
            values.append(ndcg_at_k(scores[start:end], group.relevance))
            start = end
        return {"ndcg_at_10": sum(values) / len(values)}


TASKS: dict[str, type[Classification] | type[Reranking]] = {
    "classifier": Classification,
    "reranker": Reranking,
}


def _similar_lengths(lengths: Sequence[int], batch: int, seed: int) -> list[list[int]]:
    """Shuffled batches of items of about the same length, so that little padding is computed."""
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = batch * 16
    batches = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [near[i : i + batch] for i in range(0, len(near), batch)]
    rng.shuffle(batches)
    return batches


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    import torch

    width = max(len(ids) for ids, _ in batch)
    ids, mask, types = (torch.zeros(len(batch), width, dtype=torch.int64) for _ in range(3))
    for row, (tokens, segments) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        types[row, : len(tokens)] = torch.tensor(segments)
        mask[row, : len(tokens)] = 1
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    return logits


def _predict(model: Any, encoded: Batch) -> list[list[float]]:
    """Logits in FP32 (this is what quantization is compared with), in the order given."""
    import torch

    rows: list[list[float]] = [[]] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            some = order[start : start + 32]
            cut = [
                (ids[:_SERVED_LENGTH], types[:_SERVED_LENGTH]) for ids, types in (encoded[i] for i in some)
            ]
            for i, row in zip(some, _logits(model, cut).tolist(), strict=True):
                rows[i] = row
    return rows


def _parameter_groups(model: Any, learning_rate: float) -> list[dict[str, Any]]:
    groups: dict[float, list[Any]] = {}
    for name, parameter in model.named_parameters():
        factor = next((f for part, f in _FASTER.items() if part in name), 1.0)
        groups.setdefault(factor, []).append(parameter)
    return [{"params": group, "lr": learning_rate * factor} for factor, group in groups.items()]
