"""A causal LM engine with its KV cache: prefill one slot by chunks, decode any set of slots in one step.

The cache is one array per layer and kind, [rows, kv_heads, capacity, head_dim], allocated once. Every run
reads and writes it in place: past and present are bound to the same address, so a step moves only the new
token's keys and values. A batch must be neighbouring rows of those arrays; runtime.rows says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.huge_pages import collapse_heap
from triton_repo.runtime.rows import Rows
from triton_repo.runtime.session import EXACT_PRODUCTS, EngineRefused, checked_folder, onnx_session

FloatArray = npt.NDArray[np.float32]

# Long prompts go through integer matrix products where the engine folder has a graph for them.
PREFILL_FILE = "prefill.onnx"
# Each graph has threads of its own, which spin for a while after a run. Beside the other graph's they made
# ten steps after a prompt up to three times as slow, and a prompt among steps a third slower.
_SHARED_CORES = {"session.force_spinning_stop": "1"}
_REQUIRED = ("layers", "kv_heads", "head_dim", "vocabulary", "slots", "capacity", "chunk")


def kernel_settings(kernels: Mapping[str, int] | None, *, prefill: bool = False) -> dict[str, str]:
    """ONNX Runtime's session options for INT8 weights: inputs that share an activation scale, arithmetic.

    "block": ONNX Runtime's default of 32 spends a tenth of a step on scales. "accuracy": 4 computes in INT8,
    1 in float32. Which pass a model's gate is decided when the engine is built, and stands in its manifest.
    """
    if not kernels:
        return {}
    settings = {
        "session.qdq_matmulnbits_block_size": str(kernels["block"]),
        "session.qdq_matmulnbits_accuracy_level": str(kernels["accuracy"]),
    }
    # Only the prefill graph has products of integers; in the other, MatMulNBits is exact as it is, and the
    # option would make ONNX Runtime 1.31 give each matrix one zero point where its scales are by column.
    return settings if prefill else settings | {EXACT_PRODUCTS: "0"}


@dataclass(slots=True)
class _Step:
    """A decode step over rows [first, first + size), bound once and run many times."""

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    logits: FloatArray
    binding: Any


class DecoderEngine:
    """One loaded engine and its cache. Not thread safe: one scheduler owns it.

    `slots` sequences of at most `capacity` tokens; prompts enter `chunk` tokens at a time.
    """

    def __init__(self, manifest: Mapping[str, Any], session: Any, prefill: Any) -> None:
        """`session` decodes; `prefill` may be the same or another graph of the same model."""
        serving = manifest["serving"]
        self.manifest = dict(manifest)
        self.slots: int = serving["slots"]
        self.capacity: int = serving["capacity"]
        self.chunk: int = serving["chunk"]
        self.vocabulary: int = serving["vocabulary"]
        self._session = session
        self._prefill = prefill
        shape = (self.slots, serving["kv_heads"], self.capacity, serving["head_dim"])
        self._cache = {
            f"{kind}.{layer}": np.zeros(shape, np.float32)
            for layer in range(serving["layers"])
            for kind in ("key", "value")
        }
        self._rows = Rows(self.slots, self.capacity)
        self._steps: dict[tuple[int, int], _Step] = {}
        # One for all steps: one for each set of rows would be half a gigabyte (16 slots, 150,000 tokens).
        self._logits = np.empty((self.slots, 1, self.vocabulary), np.float32)

    @classmethod
    def open(cls, folder: Path, threads: int | None = None) -> DecoderEngine:
        """Check digests, load the graphs, allocate the cache. Raises EngineRefused."""
        folder = Path(folder)
        manifest = checked_folder(folder)
        if manifest["target"] != "onnxruntime":
            raise EngineRefused(
                f"{folder}: built for target {manifest['target']!r}; "
                "this runtime serves 'onnxruntime' engines"
            )
        missing = [key for key in _REQUIRED if not isinstance(manifest["serving"].get(key), int)]
        if missing:
            raise EngineRefused(f"{folder}: the manifest's serving part lacks {', '.join(missing)}")
        kernels = manifest.get("kernels")
        settings = {**kernel_settings(kernels), **_SHARED_CORES}
        session = onnx_session(folder / manifest["engine"]["file"], threads, settings=settings)
        prefill = session
        if PREFILL_FILE in manifest["files"]:
            settings = {**kernel_settings(kernels, prefill=True), **_SHARED_CORES}
            prefill = onnx_session(folder / PREFILL_FILE, threads, settings=settings)
        engine = cls(manifest, session, prefill)
        engine._warm_up()
        return engine

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """Write `tokens` (at most `chunk`) at positions start.. of `slot`.

        Returns the logits [vocabulary] after the last of them.
        """
        logits: FloatArray = self._read(slot, tokens, start, [len(tokens) - 1])[0]
        return logits

    def logits(self, tokens: Sequence[int], slot: int = 0) -> FloatArray:
        """Logits [n, vocabulary] after each of n tokens, read from position 0 of `slot` as a prompt is."""
        found = [
            self._read(slot, part, start, list(range(len(part))))
            for start in range(0, len(tokens), self.chunk)
            if (part := tokens[start : start + self.chunk])
        ]
        return np.concatenate(found)

    def decode(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> FloatArray:
        """One step: tokens[i] goes to position lengths[i] of slots[i]. Returns logits [n, vocabulary].

        The array is the engine's own and is overwritten by the next call.
        """
        first = self._rows.gather(slots, self._swap)
        places = [self._rows[slot] - first for slot in slots]
        step = self._steps.get((first, len(slots)))
        if step is None:
            step = self._steps[first, len(slots)] = self._bound(first, len(slots))
        for place, slot, token, length in zip(places, slots, tokens, lengths, strict=True):
            self._rows.check(slot, length, 1)
            step.tokens[place, 0] = token
            step.lengths[place] = length
            self._rows.used[slot] = length + 1
        self._session.run_with_iobinding(step.binding)
        logits = step.logits[:, 0]
        return logits if places == list(range(len(places))) else logits[places]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` cached tokens of `source` become those of `target`."""
        self._rows.check(source, 0, length)
        origin, place = self._rows[source], self._rows[target]
        for array in self._cache.values():
            array[place, :, :length] = array[origin, :, :length]
        self._rows.used[target] = length

    def close(self) -> None:
        """Give the cache and the weights back."""
        self._steps.clear()
        self._cache.clear()
        self._session = self._prefill = None

    def _read(self, slot: int, tokens: Sequence[int], start: int, wanted: list[int]) -> FloatArray:
        self._rows.check(slot, start, len(tokens))
        row = self._rows[slot]
        logits = np.empty((1, len(wanted), self.vocabulary), np.float32)
        inputs = {
            "input_ids": np.array([tokens], np.int64),
            "past_lengths": np.array([start], np.int64),
            "logit_indices": np.array([wanted], np.int64),
        }
        binding = self._binding(self._prefill, row, 1, inputs, logits)
        self._prefill.run_with_iobinding(binding)
        self._rows.used[slot] = start + len(tokens)
        rows: FloatArray = logits[0]
        return rows

    def _bound(self, first: int, size: int) -> _Step:
        tokens = np.zeros((size, 1), np.int64)
        lengths = np.zeros(size, np.int64)
        logits = self._logits[:size]
        inputs = {
            "input_ids": tokens,
            "past_lengths": lengths,
            "logit_indices": np.zeros((size, 1), np.int64),
        }
        return _Step(tokens, lengths, logits, self._binding(self._session, first, size, inputs, logits))

    def _binding(
        self, session: Any, row: int, size: int, inputs: dict[str, npt.NDArray[Any]], logits: FloatArray
    ) -> Any:
        """Everything by address. A binding does not keep arrays alive, so it carries them itself."""
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        for name, array in self._cache.items():
            rows = array[row : row + size]
            place = ("cpu", 0, np.float32, rows.shape, rows.ctypes.data)
            binding.bind_input(f"past_{name}", *place)
            binding.bind_output(f"present_{name}", *place)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        binding.arrays = (inputs, logits)
        return binding

    def _swap(self, row: int, other: int, length: int) -> None:
        for array in self._cache.values():
            kept = array[other, :, :length].copy()
            array[other, :, :length] = array[row, :, :length]
            array[row, :, :length] = kept

    def _warm_up(self) -> None:
        """First runs allocate; then the weights move to huge pages."""
        self.prefill(0, [0] * min(self.chunk, self.capacity), 0)
        self.decode([0], [0], [0])
        self._rows.used[0] = 0
        collapse_heap()
