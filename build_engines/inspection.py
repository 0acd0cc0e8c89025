"""`inspect`: what an engine says of itself, after it was checked that it is that engine."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_engines.errors import ArtifactError
from build_engines.gates import Check, describe
from build_engines.manifest import MANIFEST, read_engine_manifest
from build_engines.targets.engine_file import check_engine, read_header

if TYPE_CHECKING:
    from rich.console import RenderableType


def describe_engine(path: Path) -> dict[str, Any]:
    """The manifest of the engine at `path` (its folder or a file in it) and where it is.

    Raises:
        ArtifactError: no engine there; files that do not match their digests; an engine for another card than
            its manifest says, or of another version of the library than is installed here.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist", next_step="build it: build-engines build STACK")
    if path.suffix == ".trt" and not (path.parent / MANIFEST).exists():
        raise _without_manifest(path)
    folder, manifest = read_engine_manifest(path)
    if manifest["target"] == "tensorrt-rtx":
        _check_compiled(folder / manifest["engine"]["file"], manifest)
    return {"folder": str(folder), **manifest}


def _check_compiled(engine: Path, manifest: dict[str, Any]) -> None:
    """The engine's own header against the manifest's card, and against the library where that is here."""
    installed: str | None = None  # an engine may be looked at where it cannot be run
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.version("tensorrt-rtx")
    # One for many cards was asked for none by name; its runner asks the library about the card that is there.
    card = None if manifest.get("portable") else manifest.get("compute_capability")
    check_engine(engine, version=installed, compute_capability=card)


def _without_manifest(path: Path) -> ArtifactError:
    """A bare engine file: say what it is, and why that is not enough."""
    header = read_header(path)
    cards = " and ".join(header.compute_capabilities) or "a card that is not known here"
    return ArtifactError(
        f"{path}: a whole TensorRT-RTX {header.version} engine for compute capability {cards}, "
        f"but no {MANIFEST} beside it",
        cause="without its manifest nobody knows what it was made from, or whether it passed its gates",
        next_step="copy the whole folder that `build-engines build` wrote, or build it again",
    )


def render_engine(engine: dict[str, Any]) -> RenderableType:
    """The same for people. ArtifactError for a manifest that lacks what every engine's has."""
    from rich.table import Table
    from rich.text import Text

    try:
        rows = list(_rows(engine))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{engine['folder']}: the manifest does not say what it should ({type(error).__name__}: {error})",
            cause="another version of onecard wrote it, or somebody by hand",
            next_step="build it again: build-engines build STACK",
        ) from error
    # As Text: in a plain string Rich would take "[ok]" for a colour.
    table = Table(show_header=False, box=None, title=Text(engine["folder"]), title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _rows(engine: dict[str, Any]) -> Iterator[tuple[str, str]]:
    serving, profile = engine["serving"], engine["profile"]
    yield "model", f"{engine['model']} ({engine['task']}, {engine['precision']})"
    yield "target", str(engine["target"])
    if engine["compute_capability"]:
        others = ", portable: 8.0, 8.6, 8.9, 12.0 and later" if engine.get("portable") else ""
        yield "compute capability", engine["compute_capability"] + others
    if engine["versions"]:
        yield "versions", ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
    yield "engine", f"{engine['engine']['file']}, {engine['engine']['bytes'] / 2**20:.1f} MiB"
    yield "digest", f"sha256 {engine['engine']['sha256']}"
    if "batch" in profile:
        yield "profile", f"batch {profile['batch']}, sequence {profile['sequence']} (min, opt, max)"
        yield "inputs", ", ".join(serving["inputs"])
        yield "outputs", ", ".join(serving["outputs"])
    else:
        shown = f"{profile['slots']} slots of {profile['capacity']} tokens, prompts by {profile['chunk']}"
        yield "profile", shown
    if memory := engine.get("memory"):
        parts = ", ".join(f"{part} {size / 2**20:,.1f}" for part, size in memory.items() if size)
        yield "planned memory, MiB", parts
    for stage, report in engine["gates"].items():
        yield f"gate ({stage})", _gate_lines(report.get("gate", report))
    if engine["target"] == "tensorrt-llm":
        yield "gate", "none: TensorRT-LLM serves the checkpoint as it is stored"
    elif "engine" not in engine["gates"]:
        yield "gate (engine)", "not judged on a GPU yet"
    elif device := engine.get("judged_on"):
        yield "judged on", f"{device['name']}, compute capability {device['compute_capability']}"
    returned = engine["gates"].get("graph", {}).get("returned") or []
    if returned:
        yield (
            "layers returned",
            "\n".join(
                f"{item['layer']} to {item['mode']} (sensitivity {item['sensitivity']:.1e})"
                for item in returned
            ),
        )
    if layers := sorted(engine.get("layers", {}).items(), key=lambda item: -item[1]):
        yield "layer types", ", ".join(f"{count} {name}" for name, count in layers)


def _gate_lines(report: dict[str, Any]) -> str:
    checks = [Check(c["name"], c["value"], c["limit"], c["sense"]) for c in report["checks"]]
    return "\n".join(describe(check) for check in checks)
