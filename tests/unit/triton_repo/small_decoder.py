"""A random Llama of two layers: its graph as an engine of the fake TensorRT, and lowered for the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
from fake_gpu import FakeCudart
from fake_tensorrt import FakeTensorRT, write_engine
from llama_checkpoint import Llama, normal

from build_engines.export.decoder import open_decoder, write_decoder
from build_engines.graphs import fix_dimension
from build_engines.manifest import write_manifest
from build_engines.profiles import DecoderProfile
from build_engines.targets.decoder_lowering import lower_decoder, widen_decoder
from triton_repo.runtime.decoder import DecoderEngine
from triton_repo.runtime.gpu.cuda import Device
from triton_repo.runtime.gpu.decoder import GpuDecoder
from triton_repo.runtime.gpu.tensorrt import TensorRTEngine
from triton_repo.runtime.session import onnx_session

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
SLOTS, CAPACITY, CHUNK = 4, 92, 32


def serving(vocabulary: int, **changes: int) -> dict[str, Any]:
    sizes = {"layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocabulary": vocabulary}
    bounds = {"slots": SLOTS, "capacity": CAPACITY, "chunk": CHUNK}
    return {"task": "generate", "eos_ids": [2], "bos_id": 1, **sizes, **bounds} | changes


def write_model(folder: Path, vocabulary: int) -> None:
    """`folder`/model.onnx, engine.trt and cpu.onnx: one model in FP32."""
    checkpoint = folder / "checkpoint"
    write_checkpoint(checkpoint, vocabulary)
    write_decoder(open_decoder(checkpoint), folder / "model.onnx", precision="fp32")
    typed = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    onnx.save(lower_decoder(widen_decoder(typed, folder), {}), str(folder / "cpu.onnx"))
    graph = onnx.load(str(folder / "model.onnx"))
    fix_dimension(graph, "capacity", CAPACITY)
    write_engine(folder / "engine.trt", graph, DecoderProfile(SLOTS, CAPACITY, CHUNK).ranges)


def cpu_engine(folder: Path, manifest: dict[str, Any]) -> DecoderEngine:
    session = onnx_session(folder / "cpu.onnx", 1)
    return DecoderEngine(manifest, session, session)


def gpu_engine(
    folder: Path, manifest: dict[str, Any], api: FakeCudart, trt: FakeTensorRT, **promised: int
) -> GpuDecoder:
    device = Device(api=api, promised=promised)
    engine = TensorRTEngine(folder / "engine.trt", trt, device, runtime_cache=folder / "kernels.cache")
    return GpuDecoder(manifest, engine, device)


def write_engine_folder(folder: Path, model: Path, manifest: dict[str, Any], tokenizer: Any) -> None:
    """`folder` as the pipeline leaves it for TensorRT-RTX and a card of 12.0."""
    folder.mkdir()
    shutil.copyfile(model / "engine.trt", folder / "engine.trt")
    tokenizer.save(str(folder / "tokenizer.json"))
    card = {"target": "tensorrt-rtx", "precision": "fp16", "compute_capability": "12.0"}
    write_manifest(folder, manifest | card, "engine.trt")


def write_checkpoint(folder: Path, vocabulary: int) -> None:
    sizes = {"layers": LAYERS, "hidden": HIDDEN, "ffn": FFN, "heads": HEADS, "kv_heads": KV_HEADS}
    Llama(**sizes, vocabulary=vocabulary).write(folder, normal(0, 0.2, mean=1.0))
