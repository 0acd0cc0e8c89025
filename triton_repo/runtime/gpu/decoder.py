"""A causal LM on the GPU: `runtime.decoder.DecoderEngine` over an engine of TensorRT or ONNX Runtime.

An engine has two profiles of shapes, decode and prefill, each with an execution context. Both read and write
one cache: past and present are bound to one address, which TensorRT's cache update asks for. Inputs and
logits have a fixed place, so that a step differs from the last one in nothing but numbers, and can be a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.gpu.cache import DeviceCache
from triton_repo.runtime.gpu.cuda import Device
from triton_repo.runtime.rows import Rows
from triton_repo.runtime.session import EngineRefused

if TYPE_CHECKING:
    from triton_repo.runtime.gpu.tensorrt import TensorRTEngine

FloatArray = npt.NDArray[np.float32]
_DECODE, _PREFILL = 0, 1
_ALIGNED = 256 // 8  # int64 elements between places where a tensor may begin
# Fewer tokens than this take as long: a step reads every weight in any case.
_SMALLEST = 16


class GpuDecoder:
    """One loaded engine and its cache. Not thread safe: one scheduler owns it.

    `slots` sequences of at most `capacity` tokens; prompts enter `chunk` tokens at a time.
    """

    def __init__(self, manifest: Mapping[str, Any], engine: TensorRTEngine, device: Device) -> None:
        """Takes all memory that the cache and the buffers need; the engine has its own.

        Raises EngineRefused where the engine is not what the manifest says, and DeviceMemoryFull.
        """
        serving = manifest["serving"]
        self.manifest = dict(manifest)
        self.slots: int = serving["slots"]
        self.capacity: int = serving["capacity"]
        self.chunk: int = serving["chunk"]
        self.vocabulary: int = serving["vocabulary"]
        self._engine, self._device = engine, device
        self._positions = _check(engine, serving)
        self._rows = Rows(self.slots, self.capacity)
        self._cache = DeviceCache(device, serving, engine.tensors["past_key.0"].dtype)
        self._contexts = {profile: engine.context(profile) for profile in (_DECODE, _PREFILL)}
        self._sizes = _sizes(self.chunk)
        # By batch, tokens and logits of each row: the profile that takes such a run, and its inputs' shapes.
        self._shapes: dict[tuple[int, int, int], tuple[int, dict[str, tuple[int, ...]]]] = {}
        self._addresses: dict[int, dict[str, int]] = {}
        self._buffers()

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """Write `tokens` (at most `chunk`) at positions start.. of `slot`.

        Returns the logits [vocabulary] after the last of them.
        """
        last: FloatArray = self._read(slot, tokens, start, [len(tokens) - 1])[0].copy()
        return last

    def logits(self, tokens: Sequence[int], slot: int = 0) -> FloatArray:
        """Logits [n, vocabulary] after each of n tokens, read from position 0 of `slot` as a prompt is."""
        found = np.empty((len(tokens), self.vocabulary), np.float32)
        for start in range(0, len(tokens), self.chunk):
            part = tokens[start : start + self.chunk]
            # A run gives few positions' logits; a chunk that is read again writes what lies there already.
            for first in range(0, len(part), self._positions):
                wanted = list(range(len(part)))[first : first + self._positions]
                padding = [wanted[-1]] * (self._positions - len(wanted))
                rows = self._read(slot, part, start, wanted + padding)
                found[start + first :][: len(wanted)] = rows[: len(wanted)]
        return found

    def decode(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> FloatArray:
        """One step: tokens[i] goes to position lengths[i] of slots[i]. Returns logits [n, vocabulary].

        The array is the engine's own and is overwritten by the next call.
        """
        for slot, length in zip(slots, lengths, strict=True):
            self._rows.check(slot, length, 1)
        first, size = self._rows.gather(slots, self._cache.swap), len(slots)
        places = [self._rows[slot] - first for slot in slots]
        for place, token, length in zip(places, tokens, lengths, strict=True):
            self._ids[place] = token
            self._lengths[place] = length
        self._wanted[:size] = 0
        logits = self._run(first, (size, 1, 1), places)
        for slot, length in zip(slots, lengths, strict=True):
            self._rows.used[slot] = length + 1
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` cached tokens of `source` become those of `target`."""
        self._rows.check(source, 0, length)
        if source != target:
            self._cache.copy(self._rows[source], self._rows[target], length)
        self._rows.used[target] = length

    def warm_up(self) -> None:
        """Run every usual shape once: kernels are chosen now, and what does not fit is known now."""
        for size in self._sizes:
            self.prefill(0, [0] * size, 0)
        for size in range(1, self.slots + 1):
            self.decode(range(size), [0] * size, [0] * size)
        self._rows.used[:] = [0] * self.slots
        self._engine.save_cache()

    def close(self) -> None:
        """Give everything on the device back; a second time does nothing."""
        try:
            self._engine.close()
        finally:
            self._device.close()

    def _buffers(self) -> None:
        """Ids, lengths and wanted positions side by side, so that one copy brings all; and the logits."""
        sizes = (max(self.slots, self.chunk), self.slots, max(self.slots, self._positions))
        places = [0]
        for size in sizes:
            places.append(places[-1] + -(-size // _ALIGNED) * _ALIGNED)
        self._inputs = self._device.array((places[-1],), np.int64, "buffers")
        self._staged: npt.NDArray[np.int64] = self._device.pinned((places[-1],), np.int64)
        self._staged[:] = 0
        self._ids, self._lengths, self._wanted = (self._staged[start:] for start in places[:-1])
        shape = (max(self.slots, self._positions), self.vocabulary)
        self._output = self._device.array(shape, np.float32, "buffers")
        self._logits: FloatArray = self._device.pinned(shape, np.float32)
        names = ("input_ids", "past_lengths", "logit_indices")
        begins = {
            name: self._inputs.address + 8 * start for name, start in zip(names, places[:-1], strict=True)
        }
        self._fixed = {**begins, "logits": self._output.address}

    def _read(self, slot: int, tokens: Sequence[int], start: int, wanted: list[int]) -> FloatArray:
        """One chunk of a prompt; the logits [n, vocabulary] of its positions `wanted`."""
        count = len(tokens)
        self._rows.check(slot, start, count)
        if count > self.chunk:
            raise ValueError(f"{count} tokens are more than the engine's chunk of {self.chunk}")
        size = next((size for size in self._sizes if size >= count), count)
        # What pads a prompt is written behind it, where the next tokens come; never beyond the slot.
        size = size if start + size <= self.capacity else count
        self._ids[:count] = tokens
        self._ids[count:size] = 0
        self._lengths[0] = start
        self._wanted[: len(wanted)] = wanted
        logits = self._run(self._rows[slot], (1, size, len(wanted)))
        self._rows.used[slot] = start + count
        return logits

    def _run(self, row: int, sizes: tuple[int, int, int], order: Sequence[int] = ()) -> FloatArray:
        """Run over rows row.. of the cache: `sizes` are batch, tokens and logits of each row.

        `order`: which of the logits come first, second, ... where that is not as they are.
        """
        if sizes not in self._shapes:
            batch, sequence, logits = sizes
            inputs = {
                "input_ids": (batch, sequence),
                "past_lengths": (batch,),
                "logit_indices": (batch, logits),
            }
            shapes = inputs | self._cache.shapes(batch)
            self._shapes[sizes] = self._engine.profile_for(shapes), shapes
        if row not in self._addresses:
            self._addresses[row] = self._fixed | self._cache.addresses(row)
        self._device.upload(self._inputs.address, self._staged)
        profile, shapes = self._shapes[sizes]
        self._contexts[profile].enqueue(shapes, self._addresses[row])
        found = self._logits[: sizes[0] * sizes[2]]
        if list(order) in ([], list(range(len(order)))):
            self._device.download(found, self._output.address)
        else:  # put in order on the way: the host would move megabytes in every step
            for target, place in zip(found, order, strict=True):
                self._device.download(target, self._output.address + place * target.nbytes)
        self._device.synchronize()
        return found


def _check(engine: TensorRTEngine, serving: Mapping[str, Any]) -> int:
    """Compare the engine with its manifest; returns how many positions' logits a run gives."""
    if problem := _mismatch(engine, serving):
        raise EngineRefused(f"{engine.path}: {problem}; build the engine again")
    return engine.tensors["logit_indices"].ranges[_PREFILL][2][1]


def _mismatch(engine: TensorRTEngine, serving: Mapping[str, Any]) -> str | None:
    tensors, layers = engine.tensors, range(serving["layers"])
    past = {f"past_{kind}.{layer}" for layer in layers for kind in ("key", "value")}
    caches = past | {name.replace("past", "present") for name in past}
    if tensors.keys() != caches | {"input_ids", "past_lengths", "logit_indices", "logits"}:
        return f"its {len(tensors)} tensors are not those of an LLM of {len(layers)} layers"
    row = (serving["kv_heads"], serving["capacity"], serving["head_dim"])
    kinds = {(tensors[name].shape[1:], tensors[name].dtype) for name in caches}
    if kinds != {(row, tensors["past_key.0"].dtype)}:
        return f"a row of its cache is {sorted(map(str, kinds))}, the manifest says {row}"
    logits = tensors["logits"]
    if (logits.shape[-1], logits.dtype) != (serving["vocabulary"], np.dtype(np.float32)):
        found = f"{logits.dtype} of {logits.shape[-1]} tokens"
        return f"its logits are {found}, the manifest says float32 of {serving['vocabulary']}"
    if engine.profiles <= _PREFILL:
        return "it has one optimization profile, and an LLM needs two"
    slots = tensors["past_lengths"].ranges[_DECODE][2][0]
    chunk = tensors["input_ids"].ranges[_PREFILL][2][1]
    if slots < serving["slots"] or chunk < serving["chunk"]:
        promised = f"{serving['slots']} and {serving['chunk']}"
        return f"it takes {slots} slots and chunks of {chunk} tokens, the manifest says {promised}"
    return None


def _sizes(chunk: int) -> list[int]:
    """Lengths that prompts are padded to: few, because every one has kernels and a graph of its own."""
    return [*(size for size in (_SMALLEST << step for step in range(12)) if size < chunk), chunk]
