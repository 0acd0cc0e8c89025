"""`inspect`: what an engine folder says of itself, after every digest in it was checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_engines.gates import Check, describe
from build_engines.manifest import read_engine_manifest

if TYPE_CHECKING:
    from rich.console import RenderableType


def describe_engine(path: Path) -> dict[str, Any]:
    """The manifest of the engine at `path` (its folder or a file in it) and where it is.

    Raises:
        ArtifactError: no engine there, or files that do not match their digests.
    """
    folder, manifest = read_engine_manifest(path)
    return {"folder": str(folder), **manifest}


def render_engine(engine: dict[str, Any]) -> RenderableType:
    """The same for people."""
    from rich.table import Table

    table = Table(show_header=False, box=None, title=engine["folder"], title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    serving, profile = engine["serving"], engine["profile"]
    table.add_row("model", f"{engine['model']} ({engine['task']}, {engine['precision']})")
    table.add_row("target", engine["target"])
    if engine["compute_capability"]:
        table.add_row("compute capability", engine["compute_capability"])
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in engine["versions"].items()))
    table.add_row("engine", f"{engine['engine']['file']}, {engine['engine']['bytes'] / 2**20:.1f} MiB")
    table.add_row("digest", f"sha256 {engine['engine']['sha256']}")
    table.add_row("profile", f"batch {profile['batch']}, sequence {profile['sequence']} (min, opt, max)")
    table.add_row("inputs", ", ".join(serving["inputs"]))
    table.add_row("outputs", ", ".join(serving["outputs"]))
    for stage, report in engine["gates"].items():
        table.add_row(f"gate ({stage})", _gate_lines(report.get("gate", report)))
    returned = engine["gates"].get("graph", {}).get("returned") or []
    if returned:
        lines = (
            f"{item['layer']} to {item['mode']} (sensitivity {item['sensitivity']:.1e})" for item in returned
        )
        table.add_row("layers returned", "\n".join(lines))
    layers = sorted(engine.get("layers", {}).items(), key=lambda item: -item[1])
    table.add_row("layer types", ", ".join(f"{count} {name}" for name, count in layers))
    return table


def _gate_lines(report: dict[str, Any]) -> str:
    checks = [Check(c["name"], c["value"], c["limit"], c["sense"]) for c in report["checks"]]
    return "\n".join(describe(check) for check in checks)
