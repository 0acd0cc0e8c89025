"""Open an engine folder for the target that its manifest names, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_repo.runtime.session import EngineRefused, check_files, open_engine, read_manifest
from triton_repo.runtime.texts import EngineFailed

if TYPE_CHECKING:
    from triton_repo.runtime.gpu.cuda import Device

TARGETS = ("onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt")
_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def open_encoder_engine(folder: Path, threads: int | None = None, device: int = 0) -> Any:
    """An engine of classify, embed or rerank (`runtime.encode.RunsEngine`) that has run once.

    Args:
        threads: compute threads of an engine on the CPU (default: one per core).
        device: the number of the GPU for an engine on a GPU.

    Raises:
        EngineRefused: files that do not match their digests; another target, card or library; no room.
    """
    if _target(folder) == "onnxruntime":
        return open_engine(folder, threads)
    return _open_on_gpu(Path(folder), device, _encoder)


def open_decoder_engine(folder: Path, threads: int | None = None, device: int = 0) -> Any:
    """An engine of generate (`runtime.decoder.DecoderEngine`) that has run once; otherwise the same."""
    target = _target(folder)
    if target == "onnxruntime":
        from triton_repo.runtime.decoder import DecoderEngine

        return DecoderEngine.open(folder, threads)
    if target == "onnxruntime-cuda":
        from triton_repo.runtime.gpu.onnxruntime import open_recorded

        def opened(graphs: bool) -> Any:
            return _open_on_gpu(Path(folder), device, partial(_decoder, graphs=graphs))

        return open_recorded(opened, str(folder))
    return _open_on_gpu(Path(folder), device, _decoder)


def _target(folder: Path) -> str:
    target = str(read_manifest(Path(folder))["target"])
    if target not in TARGETS:
        raise EngineRefused(
            f"{folder}: built for target {target!r}; engines of {', '.join(TARGETS)} are opened here"
        )
    return target


def _open_on_gpu(folder: Path, index: int, made: Callable[[Path, dict[str, Any], Device], Any]) -> Any:
    """Digests, then the device, then `made` on it, which is given back if anything of that fails."""
    from triton_repo.runtime.gpu.cuda import Device

    manifest = read_manifest(folder)
    check_files(folder, manifest)
    try:
        device = Device(index, promised=manifest.get("memory"))
        try:
            engine = made(folder, manifest, device)
            engine.warm_up()
        except BaseException:
            _give_up(device)
            raise
    except EngineFailed as error:  # CudaError is one
        raise EngineRefused(f"{folder}: {error}") from error
    return engine


def _give_up(device: Device) -> None:
    with contextlib.suppress(EngineFailed):  # what went wrong before says more
        device.close()


def _encoder(folder: Path, manifest: dict[str, Any], device: Device) -> Any:
    from triton_repo.runtime.gpu.encoder import GpuEncoderEngine

    return GpuEncoderEngine(manifest, _load(folder, manifest, device, [manifest["profile"]]), device)


def _decoder(folder: Path, manifest: dict[str, Any], device: Device, *, graphs: bool = True) -> Any:
    from triton_repo.runtime.gpu.decoder import GpuDecoder

    serving = manifest["serving"]
    one = (1, 1, 1)
    decode = {"batch": (1, 1, serving["slots"]), "sequence": one, "logits": one}
    prefill = {"batch": one, "sequence": (1, 1, serving["chunk"]), "logits": (1, 1, min(8, serving["chunk"]))}
    engine = _load(folder, manifest, device, [decode, prefill], graphs=graphs)
    return GpuDecoder(manifest, engine, device)


def _load(
    folder: Path,
    manifest: Mapping[str, Any],
    device: Device,
    profiles: Sequence[Mapping[str, Sequence[int]]],
    *,
    graphs: bool = False,
) -> Any:
    """The engine itself. `profiles` and `graphs` are for ONNX Runtime; TensorRT knows both by itself."""
    engine, target = folder / manifest["engine"]["file"], manifest["target"]
    if target == "onnxruntime-cuda":
        from triton_repo.runtime.gpu.onnxruntime import OnnxRuntimeEngine

        exact = manifest["precision"] == "fp32"
        return OnnxRuntimeEngine(engine, device, profiles=profiles, exact=exact, graphs=graphs)
    from triton_repo.runtime.gpu.compatibility import check_compatible
    from triton_repo.runtime.gpu.runtime_cache import cache_path
    from triton_repo.runtime.gpu.tensorrt import TensorRTEngine

    module = _library(target)
    check_compatible(folder, manifest, device.info, str(module.__version__))
    kernels = cache_path(manifest["engine"]["sha256"], device.info.name)
    return TensorRTEngine(engine, module, device, runtime_cache=kernels)


def _library(target: str) -> Any:
    try:
        return importlib.import_module(_MODULES[target])
    except ImportError as error:
        raise EngineRefused(
            f"engines of {target} need the Python module {_MODULES[target]} ({error}); "
            f"run: pip install {target}"
        ) from error
