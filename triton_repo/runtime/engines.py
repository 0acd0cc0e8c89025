"""Open an engine folder for the target that its manifest names, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_repo.runtime.session import EngineRefused, checked_folder, open_engine, read_manifest
from triton_repo.runtime.texts import EngineFailed

if TYPE_CHECKING:
    from triton_repo.runtime.gpu.cuda import Device

TARGETS = ("onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt")
# Positions of a prompt whose logits one run gives.
_LOGIT_ROWS = 8
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
            return _open_on_gpu(Path(folder), device, _decoder, graphs=graphs)

        return open_recorded(opened, str(folder))
    return _open_on_gpu(Path(folder), device, _decoder)


def _target(folder: Path) -> str:
    target = str(read_manifest(Path(folder))["target"])
    if target not in TARGETS:
        raise EngineRefused(
            f"{folder}: built for target {target!r}; engines of {', '.join(TARGETS)} are opened here"
        )
    return target


def _open_on_gpu(
    folder: Path,
    index: int,
    made: Callable[[dict[str, Any], Any, Device], Any],
    *,
    graphs: bool = False,
) -> Any:
    """Digests, then the device, then `made` from the manifest, the loaded engine and the device.

    Whatever fails, nothing stays on the GPU. `graphs`: ONNX Runtime records decode steps.
    """
    from triton_repo.runtime.gpu.cuda import Device

    manifest = checked_folder(folder)
    with contextlib.ExitStack() as undo:
        try:
            device = Device(index, promised=manifest.get("memory"))
            undo.callback(_give_up, device)
            loaded = _load(folder, manifest, device, graphs)
            undo.callback(_give_up, loaded)
            engine = made(manifest, loaded, device)
            engine.warm_up()
        except EngineFailed as error:  # CudaError is one
            raise EngineRefused(f"{folder}: {error}") from error
        undo.pop_all()
    return engine


def _give_up(held: Any) -> None:
    with contextlib.suppress(EngineFailed):  # what went wrong before says more
        held.close()


def _encoder(manifest: dict[str, Any], loaded: Any, device: Device) -> Any:
    from triton_repo.runtime.gpu.encoder import GpuEncoderEngine

    return GpuEncoderEngine(manifest, loaded, device)


def _decoder(manifest: dict[str, Any], loaded: Any, device: Device) -> Any:
    from triton_repo.runtime.gpu.decoder import GpuDecoder

    return GpuDecoder(manifest, loaded, device)


def _load(folder: Path, manifest: Mapping[str, Any], device: Device, graphs: bool) -> Any:
    """The engine itself, in the library that it is for."""
    engine, target = folder / manifest["engine"]["file"], manifest["target"]
    if target == "onnxruntime-cuda":
        from triton_repo.runtime.gpu.onnxruntime import OnnxRuntimeEngine

        exact = manifest["precision"] == "fp32"
        return OnnxRuntimeEngine(engine, device, profiles=_profiles(manifest), exact=exact, graphs=graphs)
    from triton_repo.runtime.gpu.compatibility import check_compatible
    from triton_repo.runtime.gpu.runtime_cache import cache_path
    from triton_repo.runtime.gpu.tensorrt import TensorRTEngine

    module = _library(target)
    check_compatible(folder, manifest, device.info, str(module.__version__))
    kernels = cache_path(manifest["engine"]["sha256"], device.info.name)
    return TensorRTEngine(engine, module, device, runtime_cache=kernels)


def _profiles(manifest: Mapping[str, Any]) -> list[Mapping[str, Sequence[int]]]:
    """Sizes of the symbolic dimensions for each profile, for ONNX Runtime, whose engines have none."""
    serving = manifest["serving"]
    if manifest["task"] != "generate":
        return [manifest["profile"]]
    one, chunk = (1, 1, 1), serving["chunk"]
    decode = {"batch": (1, 1, serving["slots"]), "sequence": one, "logits": one}
    prefill = {"batch": one, "sequence": (1, 1, chunk), "logits": (1, 1, min(_LOGIT_ROWS, chunk))}
    return [decode, prefill]


def _library(target: str) -> Any:
    try:
        return importlib.import_module(_MODULES[target])
    except ImportError as error:
        raise EngineRefused(
            f"engines of {target} need the Python module {_MODULES[target]} ({error}); "
            f"run: pip install {target}"
        ) from error
