"""What every model's build has: its checkpoint, its folders, and the running of one recorded stage."""

from __future__ import annotations

import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from build_engines.errors import ArtifactError, FetchError
from build_engines.manifest import StageRun, folder_files, run_stage
from build_engines.pipeline.engine import LIBRARIES, EngineJob, EngineStage, describe
from build_engines.plan import promised_memory
from build_engines.stack import DataRef, Model, Precision, Stack, compiles
from build_engines.targets import Target
from calibration.samples import data_file
from triton_repo.runtime.session import sha256

_CHECKPOINT_FILES = (".json", ".safetensors", ".txt", ".model")


class Reporter(Protocol):
    """Hears what the pipeline does; the CLI draws it."""

    def start(self, model: str, stage: str) -> None: ...
    def progress(self, phase: str, done: int, total: int) -> None: ...
    def finish(self, run: StageRun, detail: str) -> None: ...


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """One published engine: its folder and manifest, and whether this run made it."""

    folder: Path
    manifest: dict[str, Any]
    skipped: bool

    @classmethod
    def read(cls, folder: Path, run: StageRun) -> BuiltEngine:
        """What `run` left in `folder`."""
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return cls(folder, manifest, run.skipped)


class ModelBuild(ABC):
    """All stages of one model. Each stage's inputs name everything that decides its result."""

    def __init__(self, stack: Stack, model: Model, reporter: Reporter) -> None:
        self.stack = stack
        self.model = model
        self.reporter = reporter
        self.source = stack.checkpoint_dir(model)
        self.work = stack.build_dir / "work" / model.name
        self._seen: dict[Path, tuple[int, ...]] = {}

    def engines(self, targets: Sequence[Target]) -> list[BuiltEngine]:
        """Run every stage that is not up to date; one engine per precision and target."""
        self.check_data()
        built = []
        for precision in self.model.precisions:
            graph = self.typed(precision)
            for target in targets:
                if self.runs(precision, target):
                    built.append(self.compile(precision, graph, target))
        return built

    @abstractmethod
    def check_data(self) -> None:
        """Raise DataError now for data that is missing or does not fit, not at the end of the build."""

    @abstractmethod
    def typed(self, precision: Precision) -> StageRun:
        """The stage that leaves the typed graph in `precision`, its gate passed."""

    @abstractmethod
    def compile(self, precision: Precision, graph: StageRun, target: Target) -> BuiltEngine:
        """The stage that leaves the engine of `graph` for `target`."""

    def runs(self, precision: Precision, target: Target) -> bool:
        """Whether the target has engines of this precision."""
        return compiles(target.name, self.model.task, precision)

    def facts(self, precision: Precision, target: Target, planned: Model) -> dict[str, Any]:
        """What every engine's manifest begins with; `planned` is the model with its length settled."""
        on_cpu = target.name == "onnxruntime"
        return {
            "model": self.model.name,
            "task": self.model.task,
            "precision": precision,
            "target": target.name,
            "compute_capability": self.stack.card.compute_capability if target.needs_card else None,
            "portable": self.stack.portable and target.name == "tensorrt-rtx",
            "memory": {} if on_cpu else promised_memory(self.stack, planned, precision),
        }

    def publish(self, stage: EngineStage) -> BuiltEngine:
        """Run the last stage, unless its engine is there and judged on the GPU that is here."""
        precision, target = stage.manifest["precision"], stage.target.name
        folder = self.stack.build_dir / "engines" / self.model.name / precision / target
        job = EngineJob(stage, folder, versions(*LIBRARIES[target]))
        run = self.run(
            f"{precision} {target}", folder, job.inputs(), job.build, lambda result: describe(result, folder)
        )
        return BuiltEngine.read(folder, run)

    @cached_property
    def source_digests(self) -> dict[str, str]:
        if not self.source.is_dir():
            from_hub = self.model.source_dir is None
            raise FetchError(
                f"the checkpoint of model {self.model.name!r} is not at {self.source}",
                cause="it was not fetched yet" if from_hub else "the stack file names this folder",
                next_step=f"build-engines fetch {self.stack.path}"
                if from_hub
                else f"correct [models.{self.model.name}] source; make demo trains the demo's models",
            )
        self._seen = self._checkpoint_files()  # before they are read
        return {str(path.relative_to(self.source)): sha256(path) for path in self._seen}

    def _checkpoint_files(self) -> dict[Path, tuple[int, ...]]:
        """Every file that decides the model, and what the file system says changes with it."""
        # A stack file that lies in its checkpoint's folder builds inside that folder. The other way round, as
        # the demo's models lie in its build folder, nothing is left out.
        build, source = self.stack.build_dir.absolute(), self.source.absolute()
        without = build if build.is_relative_to(source) else None
        paths = folder_files(self.source, _CHECKPOINT_FILES, without=without)
        states = ((path, path.stat()) for path in paths)
        return {path: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in states}

    def require_unchanged(self) -> None:
        """What was just read must be what the record will say was read.

        Twenty gigabytes are not hashed again: a file that was written to has another time of change.
        """
        if self._checkpoint_files() != self._seen:
            raise ArtifactError(
                f"{self.source} changed while the model {self.model.name!r} was being built from it",
                next_step="run the build again when the checkpoint is complete",
            )

    def data_digest(self, data: DataRef | None) -> str | None:
        if data is None:
            return None
        path = data_file(data.path or data.spec)
        return sha256(path) if path.is_file() else None

    def run(
        self,
        stage: str,
        folder: Path,
        inputs: dict[str, Any],
        build: Callable[[Path], dict[str, Any]],
        describe: Callable[[dict[str, Any]], str],
    ) -> StageRun:
        self.reporter.start(self.model.name, stage)
        run = run_stage(folder, inputs, build)
        self.reporter.finish(run, describe(run.result))
        return run


def versions(*distributions: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
