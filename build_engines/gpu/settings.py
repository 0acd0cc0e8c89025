"""What a run is told, and what its parts share."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from build_engines.gpu.ceilings import Ceilings
from build_engines.gpu.ceilings import Sizes as CeilingSizes
from build_engines.gpu.models import CARD_MIB, Sizes
from build_engines.gpu.results import Clock, Results
from build_engines.gpu.sides import Side
from build_engines.nvidia import Card
from build_engines.stack import Stack

GPU_TARGETS: Final = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run. `folder` keeps checkpoints and engines for the next run.

    `device`: "cuda", or "cpu" where the measuring itself is tried with small sizes and the CPU's engines.
    `memory_mib`: all engines together must live in what a card of this size leaves them.
    `block`: seconds that a contender is timed at a stretch; contenders take turns `rounds` times.
    """

    folder: Path = Path("build/gpu")
    minutes: float = 9.0
    device: str = "cuda"
    memory_mib: int = CARD_MIB
    targets: tuple[str, ...] = GPU_TARGETS
    sizes: Sizes = field(default_factory=Sizes)
    ceilings: CeilingSizes = field(default_factory=CeilingSizes)
    block: float = 0.15
    rounds: int = 3
    compiled: bool = True
    served_seconds: float = 1.0

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Who takes part beside PyTorch as it is: `compiled` PyTorch; engines of `every` target, or of the first
    that has any."""

    compiled: bool = False
    every: bool = False


@dataclass(slots=True, kw_only=True)
class Run:
    """The running benchmark: results so far, what is left of the time, and the side processes.

    `built`: the folder of each model, precision and target that was built; None where that failed.
    """

    settings: Settings
    results: Results
    clock: Clock
    card: Card | None
    sides: ExitStack
    stack: Stack | None = None
    ceilings: Ceilings = field(default_factory=Ceilings)
    built: dict[tuple[str, str, str], Path | None] = field(default_factory=dict)
    _sides: dict[str, Side] = field(default_factory=dict)

    def side(self, name: str) -> Side:
        """The process called `name`, the same for the whole run until `drop`ped."""
        if name not in self._sides:
            log = self.settings.folder / "logs" / f"{name}.log"
            self._sides[name] = self.sides.enter_context(Side(name, log))
        return self._sides[name]

    def drop(self, name: str) -> None:
        """End that process, and with it what it holds of the card."""
        if name in self._sides:
            self._sides.pop(name).close()

    def drop_all(self) -> None:
        """End every process: nothing of this run is on the card then."""
        for name in list(self._sides):
            self.drop(name)

    @property
    def engines_folder(self) -> Path:
        assert self.stack is not None
        return self.stack.build_dir / "engines"
