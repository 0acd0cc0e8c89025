"""The reference: the checkpoint in PyTorch FP32, with the Hugging Face tokenizer and none of our code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import ExportError
from build_engines.stack import Model

if TYPE_CHECKING:
    import torch

    from build_engines.verify import TextSet

FloatArray = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]

_BATCH = 32
PARITY_TOLERANCE = 1e-4
# Shapes that no other stage uses; the last is longer than the attention windows that are common.
_PARITY_SHAPES = ((1, 5), (3, 17), (2, 141))


class TorchReference:
    """One checkpoint in FP32 on the CPU, answering as its graph does: probabilities, embeddings, scores."""

    def __init__(self, folder: Path, model: Model) -> None:
        import torch
        from transformers import AutoTokenizer, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model = model
        self._torch = torch
        nested = folder / "0_Transformer"
        tokenizer_folder = nested if not (folder / "config.json").exists() and nested.is_dir() else folder
        try:
            self._encoder = self._load(folder)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                tokenizer_folder, local_files_only=True, trust_remote_code=model.allow_remote_code
            )
        except Exception as error:  # transformers raises almost anything here
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportError(
                f"Transformers cannot load {folder}: {said}",
                cause="the checkpoint lacks a file, or needs a package or remote code",
                next_step="see whether transformers.AutoTokenizer and AutoModel load that folder",
            ) from error
        if self.tokenizer.pad_token is None:  # its id is masked, but positions are counted by it
            pad = getattr(getattr(self._encoder, "config", None), "pad_token_id", None) or 0
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(pad)

    def _load(self, folder: Path) -> Any:
        from transformers import AutoModel, AutoModelForSequenceClassification

        torch = self._torch
        options: dict[str, Any] = {
            "local_files_only": True,
            "dtype": torch.float32,
            "trust_remote_code": self.model.allow_remote_code,
            "use_safetensors": True,
        }
        if self.model.task != "embed":
            return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
        if not (folder / "modules.json").exists():
            return AutoModel.from_pretrained(folder, **options).eval()
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=self.model.allow_remote_code,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        ).eval()

    def forward(self, arrays: Arrays) -> FloatArray:
        """Answers for the graph's inputs, int64 [batch, sequence]."""
        torch = self._torch
        inputs = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        with torch.inference_mode():
            found = self._embed(inputs) if self.model.task == "embed" else self._score(inputs)
        return np.asarray(found.float().numpy())

    def answers(self, data: TextSet, max_length: int) -> FloatArray:
        """Answers for every text or pair, in order, cut to `max_length` tokens by Transformers."""
        if data.task == "rerank":
            pairs = [(query, passage) for query, passages in data.groups for passage in passages]
            return self._ordered(pairs, max_length)
        return self._ordered([(text,) for text in data.texts], max_length)

    def _ordered(self, items: Sequence[tuple[str, ...]], max_length: int) -> FloatArray:
        order = sorted(range(len(items)), key=lambda index: sum(map(len, items[index])))
        found: list[FloatArray] = [np.empty(0, np.float32)] * len(items)
        for start in range(0, len(order), _BATCH):
            chunk = order[start : start + _BATCH]
            columns = [list(column) for column in zip(*(items[index] for index in chunk), strict=True)]
            encoded = self.tokenizer(
                *columns, padding=True, truncation=True, max_length=max_length, return_tensors="np"
            )
            for index, value in zip(chunk, self.forward(encoded), strict=True):
                found[index] = value
        answers = np.stack(found)
        if not np.isfinite(answers).all():
            raise ExportError(
                "PyTorch's own FP32 answers are not finite on the evaluation data",
                cause="the checkpoint's weights are damaged or hold NaN",
            )
        return answers

    def _score(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if getattr(self._encoder.config, "type_vocab_size", None) == 1:
            # A BERT tokenizer with a RoBERTa model numbers the second text 1, a type that the model lacks.
            inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
        logits: torch.Tensor = self._encoder(**inputs).logits.float()
        if self.model.task == "rerank":
            return logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, 1]
        multi_label = self._encoder.config.problem_type == "multi_label_classification"
        return logits.sigmoid() if multi_label else logits.softmax(1)

    def _embed(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn.functional import normalize

        inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        mask = inputs["attention_mask"]
        if hasattr(self._encoder, "config") and not hasattr(self._encoder, "tokenize"):
            hidden = self._encoder(**inputs).last_hidden_state
            found = _pool(hidden, mask, self.model.pooling or "mean")
        else:
            features: dict[str, Any] = dict(inputs)
            for module in self._encoder:
                kind = type(module).__name__
                if kind == "Pooling" and self.model.pooling:
                    pooled = _pool(features["token_embeddings"], mask, self.model.pooling)
                    features["sentence_embedding"] = pooled
                elif kind != "Normalize":
                    features = module(features)
            found = features["sentence_embedding"]
        return normalize(found, dim=1) if self.model.normalize else found


def _pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def check_parity(reference: TorchReference, session: Any, serving: dict[str, Any], vocabulary: int) -> float:
    """The largest absolute difference between graph and PyTorch on padded batches of otherwise unused shapes.

    Raises:
        ExportError: it exceeds PARITY_TOLERANCE; the graph is not this model.
    """
    from triton_repo.runtime.encode import ANSWER_OUTPUT

    generator = np.random.default_rng(0)
    output = ANSWER_OUTPUT[serving["task"]]
    worst = 0.0
    for batch, longest in _PARITY_SHAPES:
        width = min(longest, serving["max_positions"])
        ids = generator.integers(0, vocabulary, (batch, width))
        ids[ids == serving["pad_id"]] = (serving["pad_id"] + 7) % vocabulary
        mask = np.ones((batch, width), dtype=np.int64)
        for row in range(1, batch):
            mask[row, max(1, width - 3 * row) :] = 0
        ids = np.where(mask == 1, ids, serving["pad_id"])
        arrays = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in serving["inputs"]:
            arrays["token_type_ids"] = (np.arange(width) >= width // 2).astype(np.int64) * mask
        (found,) = session.run([output], arrays)
        worst = max(worst, float(np.abs(found - reference.forward(arrays)).max()))
    if not worst <= PARITY_TOLERANCE:
        raise ExportError(
            f"the FP32 graph differs from PyTorch by {worst:.2e}, more than {PARITY_TOLERANCE:.0e}",
            cause="the checkpoint's architecture has a detail that the exporter does not know",
            next_step="please report it with the checkpoint's config.json",
        )
    return worst
