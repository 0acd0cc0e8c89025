"""The last stage of every model: an engine is compiled, judged where something here can run it, published.

The graph passed its gate on the CPU; what a target made of it must pass the same gate again, opened as it
will be served. An engine for a GPU that is not here is published with its graph's gate alone, and its
manifest says so by what it lacks: `gates.engine`. The device is an input of the stage, so the next build on
a machine that has the GPU judges the engine, without compiling it again. Where there is no GPU, an engine
that was judged stays.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_engines.atomic import link_or_copy
from build_engines.cards import PORTABLE_FROM, capability_at_least
from build_engines.errors import CompileError, GateError
from build_engines.gates import GateReport
from build_engines.manifest import MANIFEST, RECORD, digest_of, is_whole, recorded_inputs, write_manifest
from build_engines.nvidia import gpu_compute_capability
from triton_repo.runtime.golden import FILE as GOLDEN
from triton_repo.runtime.gpu.cuda import DeviceInfo, find_device
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed

if TYPE_CHECKING:
    from build_engines.targets import Target

Build = Callable[[Path], dict[str, Any]]
_DERIVED = ("format", "engine", "files", "digest", "gates", "judged_on")
# The library whose version decides what an engine is, by target.
LIBRARIES = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-cuda": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt-rtx": ("tensorrt-rtx",),
    "tensorrt": ("tensorrt",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStage:
    """How one engine of one model comes to be.

    `inputs`: what decides it beside the manifest's own settings. `manifest`: what is known of it beforehand,
    with the graph's gate in "gates". `files` lie beside the engine. `compile` fills the folder and returns
    what else the manifest records. `judge` opens the folder as the server does; None where `compile` has
    judged already ("gates" in what it returns). `record` writes the engine's golden requests beside it.
    """

    target: Target
    inputs: Mapping[str, Any]
    manifest: Mapping[str, Any]
    files: Sequence[Path]
    compile: Build
    judge: Callable[[Path], GateReport] | None
    record: Callable[[Path], None]


class EngineJob:
    """One stage in its folder, and the GPU that can judge its engine, if one is here."""

    def __init__(self, stage: EngineStage, folder: Path, versions: Mapping[str, str | None]) -> None:
        self.stage, self.folder = stage, folder
        self.target, self.manifest, self.judge = stage.target, stage.manifest, stage.judge
        self.on_gpu = self.target.name != "onnxruntime"
        self.device = judging_device(self.manifest) if self.on_gpu else None
        self.name = (
            f"the {self.manifest['precision']} engine of {self.manifest['model']!r} for {self.target.name}"
        )
        settings = ("compute_capability", "portable", "memory")
        given = {name: self.manifest[name] for name in settings}
        self._inputs = {**stage.inputs, **given, "versions": dict(versions)}

    def inputs(self) -> dict[str, Any]:
        """With the device that judges: the one here, or else the one that judged this very engine before."""
        if not self.on_gpu:
            return self._inputs
        device: Any = None
        if self.device is not None:
            device = {"name": self.device.name, "compute_capability": self.device.compute_capability}
        elif (published := self._published()) and published["device"] and is_whole(self.folder):
            device = published["device"]
        return {**self._inputs, "device": device}

    def build(self, out: Path) -> dict[str, Any]:
        """Fill `out`; the stage's result.

        Raises:
            CompileError: the target refused the graph, or the engine does not open here.
            GateError: the engine answers otherwise than its graph; one that was published unjudged is gone.
        """
        made = self._kept(out) or self.stage.compile(out)
        for path in self.stage.files:
            shutil.copyfile(path, out / path.name)
        gates = {**self.manifest["gates"], **made.pop("gates", {})}
        manifest = {**self.manifest, "gates": gates, **made}
        write_manifest(out, manifest, self.target.engine_file)
        if self.device is not None or not self.on_gpu:
            self._run(out, manifest)
        return {"gates": gates}

    def _run(self, out: Path, manifest: dict[str, Any]) -> None:
        """Judge the engine and record its golden requests, for the manifest too. Nothing comes of it where a
        portable engine does not open on a card that it was not asked for."""
        try:
            report = self._judged(out)
            self.stage.record(out)
        except (EngineRefused, EngineFailed) as error:
            if self.manifest["portable"] and not self._on_own_card():
                return
            where = f" on the {self.device.name}" if self.device else ""
            raise CompileError(f"{self.name} does not open{where}: {error}") from None
        if report is not None:
            manifest["gates"]["engine"] = report.as_dict()
        if self.device is not None:
            manifest["judged_on"] = asdict(self.device)
        write_manifest(out, manifest, self.target.engine_file)

    def _judged(self, out: Path) -> GateReport | None:
        """The report of an engine that passed; None where compiling it judged it."""
        report = self.judge(out) if self.judge is not None else None
        if report is None or report.passed:
            return report
        self._take_back()
        where = self.device.name if self.device else "this machine"
        raise GateError(
            f"{self.name} fails the gate that its graph passed\n{report.summary()}",
            cause=f"the kernels of {self.target.name} on {where} compute something else",
            next_step="report it with the output of: build-engines inspect",
        )

    def _on_own_card(self) -> bool:
        capability = self.device.compute_capability if self.device else None
        return bool(capability == self.manifest["compute_capability"])

    def _published(self) -> dict[str, Any] | None:
        """The inputs of the engine that is published, if they are these but for the device."""
        found = recorded_inputs(self.folder)
        if found is None or "device" not in found:
            return None
        rest = {name: value for name, value in found.items() if name != "device"}
        return found if digest_of(rest) == digest_of(self._inputs) else None

    def _kept(self, out: Path) -> dict[str, Any] | None:
        """Link the published engine into `out`, if it is this one: only to be judged on another device."""
        if not self.on_gpu or self._published() is None or not is_whole(self.folder):
            return None
        manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        # What it answers is recorded anew, on the device that judges it.
        copied = {path.name for path in self.stage.files} | {GOLDEN}
        for path in self.folder.iterdir():
            if path.name not in {MANIFEST, RECORD} | copied:
                link_or_copy(path, out / path.name)
        known = {*self.manifest, *_DERIVED}
        return {name: value for name, value in manifest.items() if name not in known}

    def _take_back(self) -> None:
        """An engine that is known to fail must not be served from where it lies unjudged."""
        if self.on_gpu and self._published() is not None:
            shutil.rmtree(self.folder)


def judging_device(manifest: Mapping[str, Any]) -> DeviceInfo | None:
    """The GPU here, if it can run such an engine: one of its capability, or one that it may be tried on."""
    found = find_device()
    if not isinstance(found, DeviceInfo):
        return None
    fits = manifest["compute_capability"] in {None, found.compute_capability}
    tried = manifest["portable"] and capability_at_least(found.compute_capability, PORTABLE_FROM)
    return found if fits or tried else None


def check_device(target: Target, compute_capability: str) -> None:
    """Raise CompileError where the stack's card is here and cannot be used: engines would stay unjudged."""
    if target.name == "onnxruntime" or gpu_compute_capability() != compute_capability:
        return
    found = find_device()
    if not isinstance(found, DeviceInfo):
        raise CompileError(
            f"the stack's card is in this machine, but engines of {target.name} cannot be judged on it",
            cause=found.reason,
            next_step="put that right and run the same command; finished stages are kept",
        )


@contextlib.contextmanager
def closing(engine: Any) -> Iterator[Any]:
    """An engine, its memory given back at the end: on a GPU the next one needs it."""
    try:
        yield engine
    finally:
        if close := getattr(engine, "close", None):
            close()


def describe(result: Mapping[str, Any], folder: Path) -> str:
    """The line of a finished stage: size, and whether it was judged."""
    size = sum(path.stat().st_size for path in folder.glob("engine.*")) / 2**20
    if "engine" in result["gates"]:
        return f"{size:,.1f} MiB, verified"
    return f"{size:,.1f} MiB, not judged on a GPU yet"
