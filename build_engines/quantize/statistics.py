"""What calibration keeps of each Linear's input: the range of every channel and a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import QuantizeError
from build_engines.quantize.linears import FloatArray, Linear

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, npt.NDArray[Any]]

# Rows kept per Linear. The search for scales multiplies this many rows by every weight about a dozen times.
MAX_ROWS = 512


@dataclass(slots=True)
class InputStatistics:
    """`low`, `high` [inputs]: each channel's range over all tokens; `rows` [<= MAX_ROWS, inputs]: some."""

    low: FloatArray
    high: FloatArray
    rows: FloatArray


def collect_statistics(
    model: onnx.ModelProto,
    linears: Sequence[Linear],
    batches: Sequence[Arrays],
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, InputStatistics]:
    """Run the FP32 graph over `batches` (graph inputs, right padded) and watch every Linear's input.

    Padding tokens are left out: they never reach an answer, and their activations would widen the ranges. In
    a layer that computes the first token alone, an input is [batch, 1, inputs] and every row counts.

    Raises:
        QuantizeError: no batch, or an activation that is not finite.
    """
    tensors = sorted({linear.source for linear in linears})
    session = _watching_session(model, tensors)
    total = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if not total:
        raise QuantizeError(
            "there is nothing to calibrate with",
            cause="the calibration data holds no token",
            next_step="name texts of your own domain under [models.<name>.calibration] data",
        )
    shares = {True: _Share(total), False: _Share(sum(len(batch["attention_mask"]) for batch in batches))}
    low: dict[str, FloatArray] = {}
    high: dict[str, FloatArray] = {}
    samples: dict[str, list[FloatArray]] = {tensor: [] for tensor in tensors}
    for batch in batches:
        real = batch["attention_mask"].astype(bool)
        kept = {True: shares[True].take(int(real.sum())), False: shares[False].take(len(real))}
        for tensor, value in zip(tensors, session.run(tensors, dict(batch)), strict=True):
            every_token = value.shape[1] == real.shape[1]
            tokens = value[real] if every_token else value[:, 0]
            least, most = tokens.min(axis=0), tokens.max(axis=0)
            if not (np.isfinite(least).all() and np.isfinite(most).all()):
                raise QuantizeError(f"{tensor} is not finite on the calibration texts, so it has no range")
            low[tensor] = np.minimum(low.get(tensor, least), least)
            high[tensor] = np.maximum(high.get(tensor, most), most)
            samples[tensor].append(tokens[kept[every_token]])
        on_batch()
    gathered = {tensor: np.concatenate(parts)[:MAX_ROWS] for tensor, parts in samples.items()}
    return {x.name: InputStatistics(low[x.source], high[x.source], gathered[x.source]) for x in linears}


class _Share:
    """Picks each batch's part of the MAX_ROWS sampled rows, by its share of all `total` rows."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.generator = np.random.default_rng(0)

    def take(self, rows: int) -> npt.NDArray[np.int64]:
        count = min(rows, -(-MAX_ROWS * rows // self.total))
        return np.sort(self.generator.permutation(rows)[:count])


def _watching_session(model: onnx.ModelProto, tensors: Iterable[str]) -> Any:
    from onnx import TensorProto, helper

    from build_engines.graphs import open_session

    copy = type(model)()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    for tensor in tensors:
        if tensor not in present:
            # Of rank 3, sizes left open: a graph that goes through a file is checked, and must state a shape.
            value = helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [None, None, None])
            copy.graph.output.append(value)
    return open_session(copy)
