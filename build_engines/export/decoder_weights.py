"""A causal LM's checkpoint, read a part at a time: `Decoder` gives weights as the graph holds them.

Nothing larger than one fused Linear is ever in memory, and while a graph is written not even that: weights
pass through in blocks of rows, read from files that are mapped, not loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import ExportError
from build_engines.export.checkpoint import Array, Checkpoint, FloatArray, widened
from build_engines.export.decoder_config import LAYER_LINEARS, Architecture
from build_engines.export.decoder_families import TensorNames
from build_engines.export.graph import Weight

# Elements per block: 16 MB as float32.
_BLOCK = 1 << 22
_FP16_MAX = float(np.finfo(np.float16).max)
# Buffers that older transformers saved with the weights.
_BUFFERS = (r"\.rotary_emb\.inv_freq$", r"\.rotary\.inv_freq$", r"attn\.(masked_)?bias$")


@dataclass(frozen=True, slots=True)
class Decoder:
    """A checkpoint whose configuration and tensors are known to fit together; weights are read when asked.

    Names are the graph's: "layers.3.attention.qkv", "layers.3.ffn.norm", "head", "norm".
    """

    folder: Path
    architecture: Architecture
    names: TensorNames
    checkpoint: Checkpoint

    def linears(self) -> list[str]:
        """Every Linear of the graph in the order of the layers, "head" last."""
        layers = range(self.architecture.layers)
        return [*(f"layers.{layer}.{part}" for layer in layers for part in LAYER_LINEARS), "head"]

    def weight(self, name: str, columns: slice = slice(None)) -> FloatArray:
        """The Linear's weight, float32 [K, N], or only `columns` of it (output channels; no step)."""
        k, n = self.architecture.linear_shape(name)
        start, stop, _ = columns.indices(n)
        out = np.empty((k, max(stop - start, 0)), np.float32)
        step, first = max(1, _BLOCK // k), 0
        parts: list[tuple[str, int, int, int]] = []  # tensor, its rows [low, high), where they go
        for tensor in self._tensors(name, "weight"):
            rows = self.checkpoint.shape(tensor)[0]
            end = min(stop - first, rows)
            for low in range(max(start - first, 0), end, step):
                parts.append((tensor, low, min(low + step, end), first + low - start))
            first += rows

        def read(part: tuple[str, int, int, int]) -> None:
            tensor, low, high, place = part
            _transpose(self._rows(tensor, low, high), out[:, place : place + high - low])

        # Reading, widening and transposing let other threads run.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(read, parts))
        return out

    def bias(self, name: str) -> FloatArray | None:
        """The Linear's bias, float32 [N], or None where it has none."""
        if not self.architecture.has_bias(name.split(".", 2)[-1]):
            return None
        return np.concatenate([self.checkpoint.read(tensor) for tensor in self._tensors(name, "bias")])

    def norm(self, name: str) -> FloatArray:
        """The norm's weight as it multiplies, float32 (Gemma stores it minus one)."""
        return self.checkpoint.read(self._norm_tensor(name)) + np.float32(self.architecture.norm_offset)

    def embedding(self, rows: slice = slice(None)) -> FloatArray:
        """The embedding table, float32 [vocabulary, hidden], or some rows of it."""
        start, stop, _ = rows.indices(self.architecture.vocabulary)
        return self._rows(self._embedding_tensor, start, stop)

    def embed(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        """What the first layer reads for these token ids, float32 [..., hidden]."""
        tensor = self._embedding_tensor
        rows = widened(self.checkpoint.mapped(tensor)[ids], self.checkpoint.entry(tensor).dtype)
        return rows * np.float32(self.architecture.embedding_scale)

    def layer_parameters(self, layer: int) -> dict[str, Weight]:
        """What `layer_graph` takes as inputs beside "hidden", by input name, float32; read when asked."""
        architecture, base = self.architecture, f"layers.{layer}."
        return {
            name: Weight(shape, np.dtype(np.float32), lambda name=name: self.parameter(base + name))  # type: ignore[misc]
            for name, shape in parameter_shapes(architecture).items()
        }

    def parameter(self, name: str) -> FloatArray:
        """Any weight of the FP32 graph by its initializer's name: ....weight or ....bias_value."""
        owner, _, kind = name.rpartition(".")
        if owner == "embedding":
            return self.embedding()
        if kind == "bias_value":
            bias = self.bias(owner)
            assert bias is not None
            return bias
        return self.norm(owner) if owner.endswith("norm") else self.weight(owner)

    def pieces(self, name: str, dtype: np.dtype[Any]) -> Iterator[Array]:
        """`name`.weight in blocks of rows, in `dtype`; for Linears and "embedding".

        Raises:
            ExportError: a value that `dtype` cannot hold, with the tensor's name.
        """
        if name == "embedding":
            tensor = self._embedding_tensor
            step = max(1, _BLOCK // self.architecture.hidden)
            for start in range(0, self.architecture.vocabulary, step):
                stop = min(start + step, self.architecture.vocabulary)
                yield narrowed(self._rows(tensor, start, stop), dtype, self._place(tensor))
            return
        k, n = self.architecture.linear_shape(name)
        tensors = self._tensors(name, "weight")
        mapped = [
            (self.checkpoint.mapped(t), self.checkpoint.entry(t).dtype, self._place(t)) for t in tensors
        ]
        step = max(1, _BLOCK // n)
        for start in range(0, k, step):
            stop, first = min(start + step, k), 0
            out = np.empty((stop - start, n), dtype)
            for stored, kind, place in mapped:
                values = narrowed(widened(stored[:, start:stop], kind), dtype, place)
                _transpose(values, out[:, first : first + len(values)])
                first += len(values)
            yield out

    def claim_all(self) -> None:
        """Check the shape of every tensor the graph needs, and that the graph needs every tensor.

        Raises:
            ExportError: a tensor is missing, of another shape or type, or would be left out.
        """
        architecture, checkpoint = self.architecture, self.checkpoint
        table = (architecture.vocabulary, architecture.hidden)
        wanted: dict[str, tuple[int, ...]] = {self._embedding_tensor: table}
        wanted[self._norm_tensor("norm")] = (architecture.hidden,)
        for layer in range(architecture.layers):
            wanted |= self._layer_tensors(layer)
            for name, shape in wanted.items():
                checkpoint.claim(name, shape)
                checkpoint.float_entry(name)
            wanted = {}
        if not architecture.tied:
            checkpoint.claim(f"{self.names.head}.weight", (architecture.vocabulary, architecture.hidden))
            checkpoint.float_entry(f"{self.names.head}.weight")
        left = checkpoint.unused((*_BUFFERS, rf"^{self.names.head}\.weight$"))
        if left:
            shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            raise ExportError(
                f"{self.folder}: the graph would leave out the tensors {shown}",
                cause=f"config.json describes another model ({architecture.layers} layers of "
                f"{architecture.family}), or the architecture was changed",
                next_step="use a folder whose config.json was saved together with its weights",
            )

    def _layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Checkpoint name -> stored shape, of one layer."""
        architecture = self.architecture
        shapes: dict[str, tuple[int, ...]] = {}
        for part in LAYER_LINEARS:
            k, n = architecture.linear_shape(part)
            tensors = self._tensors(f"layers.{layer}.{part}", "weight")
            sizes = architecture.qkv_sizes if part == "attention.qkv" else (n // len(tensors),) * len(tensors)
            shapes |= {tensor: (size, k) for tensor, size in zip(tensors, sizes, strict=True)}
            if architecture.has_bias(part):
                biases = self._tensors(f"layers.{layer}.{part}", "bias")
                shapes |= {tensor: (size,) for tensor, size in zip(biases, sizes, strict=True)}
        for norm in architecture.norms:
            size = architecture.head_dim if norm.endswith(("q_norm", "k_norm")) else architecture.hidden
            shapes[self._norm_tensor(f"layers.{layer}.{norm}")] = (size,)
        return shapes

    def _tensors(self, name: str, kind: str) -> tuple[str, ...]:
        """The checkpoint's tensors that are side by side in a Linear of the graph."""
        names = self.names
        if name == "head":
            return (self._embedding_tensor if self.architecture.tied else f"{names.head}.{kind}",)
        _, layer, part = name.split(".", 2)
        modules = {
            "attention.qkv": names.qkv,
            "attention.output": (names.output,),
            "ffn.up": names.gate_up,
            "ffn.down": (names.down,),
        }[part]
        return tuple(f"{names.layer.format(i=layer)}{module}.{kind}" for module in modules)

    def _norm_tensor(self, name: str) -> str:
        if name == "norm":
            return f"{self.names.norm}.weight"
        _, layer, part = name.split(".", 2)
        return f"{self.names.layer.format(i=layer)}{self.names.norms[part]}.weight"

    @property
    def _embedding_tensor(self) -> str:
        return f"{self.names.embedding}.weight"

    def _rows(self, tensor: str, start: int, stop: int) -> FloatArray:
        return widened(self.checkpoint.mapped(tensor)[start:stop], self.checkpoint.entry(tensor).dtype)

    def _place(self, tensor: str) -> str:
        return f"{self.folder}: tensor {tensor}"


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer by their name in the graph without the layer, and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in LAYER_LINEARS:
        shapes[f"{part}.weight"] = architecture.linear_shape(part)
        if architecture.has_bias(part):
            shapes[f"{part}.bias_value"] = architecture.linear_shape(part)[1:]
    for norm in sorted(architecture.norms):
        size = architecture.head_dim if norm.endswith(("q_norm", "k_norm")) else architecture.hidden
        shapes[f"{norm}.weight"] = (size,)
    return shapes


def _transpose(rows: Array, out: Array) -> None:
    """out = rows.T, a cache line of each output row at a time: three times as fast as numpy's own."""
    tile = max(1, 64 // rows.itemsize)
    for start in range(0, len(rows), tile):
        out[:, start : start + tile] = rows[start : start + tile].T


def narrowed(values: FloatArray, dtype: np.dtype[Any], place: str) -> Array:
    """`values` in `dtype`; what is not finite there is an error that names `place`."""
    low, high = float(values.min()), float(values.max())
    limit = _FP16_MAX if dtype == np.float16 else float(np.finfo(np.float32).max)
    if -limit <= low and high <= limit:  # false for NaN
        return values.astype(dtype, copy=False)
    if not np.isfinite(values).all():
        raise ExportError(
            f"{place} holds NaN or infinity",
            cause="the training diverged, or the file is damaged",
            next_step="fetch the checkpoint again, or choose another",
        )
    raise ExportError(
        f"{place} holds {low if -low > high else high:g}, beyond FP16's largest value {limit:g}",
        cause="the checkpoint was trained in BF16 or FP32, whose range is wider",
        next_step='set precisions = ["fp32"] for this model on the CPU, or choose another checkpoint',
    )
