"""ONNX Runtime on the GPU: the typed graph, an LLM's attention in the operator made for a cache.

An encoder is its FP16 or FP32 graph as it was judged: every operator that computes in it has a CUDA kernel.
The length of an embedding alone is written out, because ONNX Runtime asks cuDNN for it, and for nothing else
here. An LLM's rotary embedding, cache update and attention become one GroupQueryAttention a layer. The
standard operators have CUDA kernels too, but with a mask they read the whole capacity of the cache at every
step; this one reads the tokens that a row holds, and appends in place.

Nothing here needs a GPU or ONNX Runtime's package for it: kernels are chosen when the engine is opened.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from build_engines.atomic import link_or_copy
from build_engines.errors import CompileError
from build_engines.graphs import fix_dimension, operator_counts, read_graph, read_structure, save_graph
from build_engines.nvidia import gpu_compute_capability
from build_engines.profiles import DecoderProfile
from build_engines.targets.decoder_lowering import GroupQueryLowering, finish_lowering
from build_engines.targets.decoder_network import check_alignment
from triton_repo.runtime.gpu.onnxruntime import LAST_OFFSET

if TYPE_CHECKING:
    import onnx

    from build_engines.profiles import Profile
    from build_engines.targets import Progress

_FLOAT = 1  # TensorProto.DataType
_HEAD = 16
_PROVIDER = "CUDAExecutionProvider"
_QUANTIZED = {"QuantizeLinear", "DequantizeLinear"}


class OnnxRuntimeCudaTarget:
    name = "onnxruntime-cuda"
    engine_file = "engine.onnx"
    needs_card = False

    def check(self) -> None:
        """Where a GPU is, the package for it is asked for as well: the engine is judged on that GPU."""
        if importlib.util.find_spec("onnxruntime") is None:
            raise _not_installed("the target onnxruntime-cuda needs the Python module onnxruntime")
        if gpu_compute_capability() is None:
            return
        import onnxruntime

        if _PROVIDER not in onnxruntime.get_available_providers():
            raise _not_installed(
                f"the onnxruntime {onnxruntime.__version__} installed here computes on the CPU only, and "
                "this machine has a GPU to judge the engine on"
            )

    def compile(
        self,
        graph: Path,
        out: Path,
        *,
        profile: Profile | DecoderProfile,
        compute_capability: str | None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Write `out`/engine.onnx; an LLM's weights beside it, hard links where the file system allows.

        Returns "versions" and "layers" {operator: count}.

        Raises:
            CompileError: the graph holds INT8, or is an LLM's in FP32.
        """
        import onnxruntime

        del compute_capability
        progress("lower", 0, 2)
        if isinstance(profile, DecoderProfile):
            model = _write_decoder(graph, out / self.engine_file, profile.capacity)
        else:
            model = read_graph(graph)
            _refuse_int8(model, graph)
            model = without_cudnn(model)
            save_graph(model, out / self.engine_file)
        progress("write", 2, 2)
        return {
            "versions": {"onnxruntime-gpu": onnxruntime.__version__},
            "layers": operator_counts(model),
        }


def without_cudnn(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every ReduceL2 as the root of a sum of squares; `model` is left as it is."""
    from onnx import helper

    result = type(model)()
    result.CopyFrom(model)
    nodes = list(result.graph.node)
    del result.graph.node[:]
    for node in nodes:
        if node.op_type == "ReduceL2":
            value, squares, total = node.input[0], f"{node.name}.squares", f"{node.name}.sum"
            reduce = helper.make_node("ReduceSum", [squares, *node.input[1:]], [total], name=total)
            reduce.attribute.extend(node.attribute)
            result.graph.node.append(helper.make_node("Mul", [value, value], [squares], name=squares))
            result.graph.node.append(reduce)
            node = helper.make_node("Sqrt", [total], list(node.output), name=node.name)  # noqa: PLW2901
        result.graph.node.append(node)
    return result


def lower_decoder_for_cuda(model: onnx.ModelProto, capacity: int) -> onnx.ModelProto:
    """An FP16 graph of `export.write_decoder` with one GroupQueryAttention a layer; `model` is left as it is.

    The operator reads each row's last position. From the shape of input_ids ONNX Runtime would compute it on
    the host: two copies between host and GPU in every step, and no step could be a CUDA graph. So the graph
    has one input more, `last_offset` (int32 [1]): tokens of this run, less one. For the same reason the
    length of the longest row, which the operator wants to know on the host, is always said to be `capacity`;
    what is read of a row is bounded by its own last position.
    """
    from onnx import TensorProto, helper, numpy_helper

    result = type(model)()
    result.CopyFrom(model)
    fix_dimension(result, "capacity", capacity)
    graph = result.graph
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(_Lowering(nodes, ends="lengths.rows").nodes())
    graph.input.append(helper.make_tensor_value_info(LAST_OFFSET, TensorProto.INT32, [1]))
    graph.initializer.append(numpy_helper.from_array(np.array([capacity], np.int32), "lengths.most"))
    del graph.value_info[:]
    finish_lowering(result)
    return result


class _Lowering(GroupQueryLowering):
    def _lengths(self) -> Iterator[onnx.NodeProto]:
        from onnx import TensorProto, helper

        starts = "lengths.starts"
        yield helper.make_node("Cast", ["past_lengths"], [starts], name=starts, to=TensorProto.INT32)
        yield helper.make_node("Add", [starts, LAST_OFFSET], [self.ends], name=self.ends)


def _write_decoder(graph: Path, engine: Path, capacity: int) -> onnx.ModelProto:

    model = read_structure(graph)
    _refuse_int8(model, graph)
    if any(value.type.tensor_type.elem_type == _FLOAT for value in model.graph.input):
        raise CompileError(
            f"{graph.name}: ONNX Runtime has no CUDA kernel for an LLM's attention in FP32",
            cause="GroupQueryAttention computes in FP16 or BF16 there",
            next_step='add "fp16" to the model\'s precisions, or use the target "onnxruntime" for fp32',
        )
    cache = next(value for value in model.graph.input if value.name == "past_key.0")
    head_dim = cache.type.tensor_type.shape.dim[3].dim_value
    if head_dim % _HEAD:
        raise CompileError(
            f"{graph.name}: ONNX Runtime has no attention with a cache for heads of {head_dim} elements",
            cause=f"GroupQueryAttention takes multiples of {_HEAD}",
            next_step='use the target "tensorrt-rtx" for this model',
        )
    lowered = lower_decoder_for_cuda(model, capacity)
    cache = next(value for value in lowered.graph.input if value.name == "past_key.0")
    check_alignment(cache, graph.name)
    data = graph.with_name(f"{graph.name}.data")
    if data.is_file():
        link_or_copy(data, engine.with_name(f"{engine.name}.data"))
    for tensor in lowered.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{engine.name}.data"
    engine.write_bytes(lowered.SerializeToString())
    return lowered


def _refuse_int8(model: onnx.ModelProto, graph: Path) -> None:
    found = sum(node.op_type in _QUANTIZED for node in model.graph.node)
    if found:
        raise CompileError(
            f"{graph.name} is quantized ({found} Q and DQ nodes), which onnxruntime-cuda does not run",
            cause="ONNX Runtime has no INT8 matrix products for such graphs on a GPU; it would widen them",
            next_step='build INT8 for the target "tensorrt-rtx" or "tensorrt", or "fp16" for this one',
        )


def _not_installed(what: str) -> CompileError:
    return CompileError(
        what,
        cause="onnxruntime and onnxruntime-gpu are one Python module; only one of them can be installed",
        next_step="pip uninstall --yes onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'",
    )
