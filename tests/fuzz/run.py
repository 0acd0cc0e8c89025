"""Run fuzz targets for a bounded time and print a line for each: executions, coverage, findings.

    python tests/fuzz/run.py --seconds 60                 # every target, one after the other
    python tests/fuzz/run.py --seconds 600 template
    python tests/fuzz/run.py --replay build/fuzz/template/crash-... template

With atheris each target has a process of its own and keeps its corpus in build/fuzz/<target>/corpus; where
atheris is not installed, the targets' form for hypothesis runs as long. What fails, takes more than 2 s or
more than 2 GB is a finding: its input lies in build/fuzz/<target>, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGETS = tuple(sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py")))
SLOW_S = 2
MEMORY_MB = 2048


@dataclass(frozen=True, slots=True)
class Row:
    """One target's run. `coverage`: edges of our own code that were seen; None without atheris."""

    target: str
    tool: str
    seconds: float
    executions: int
    coverage: int | None
    findings: list[str]


def load(name: str) -> ModuleType:
    """The module of a target: `target`, `SEEDS`, `WORDS`."""
    for folder in (str(ROOT), str(HERE)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return importlib.import_module(f"fuzz_{name}")


def timed(target: Callable[[bytes], None], data: bytes) -> None:
    """One execution; AssertionError where it takes longer than it may."""
    started = time.process_time()
    target(data)
    took = time.process_time() - started
    assert took <= SLOW_S, f"{took:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (60)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--replay", type=Path, help="run the one target on this input alone")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inner", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target called {', '.join(sorted(unknown))}")
    if options.inner is not None:
        _fuzz(names[0], options.inner)
        return
    if options.replay:
        timed(load(names[0]).target, options.replay.read_bytes())
        return
    with_atheris = importlib.util.find_spec("atheris") is not None
    if not with_atheris:
        print("atheris is not installed here: hypothesis instead", file=sys.stderr)
    rows = []
    for name in names:
        run = _run_atheris if with_atheris else _run_hypothesis
        rows.append(run(name, options.seconds, options.folder / name))
        if not options.json:
            _print(rows[-1])
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    sys.exit(any(row.findings for row in rows))


def _print(row: Row) -> None:
    coverage = "" if row.coverage is None else f"{row.coverage:,} edges, "
    found = ", ".join(row.findings) or "none"
    counted = f"{row.seconds:6.0f} s {row.executions:12,} executions, {coverage}findings: {found}"
    print(f"{row.target:15} {row.tool:10} {counted}", flush=True)


def _run_atheris(name: str, seconds: float, folder: Path) -> Row:
    module, corpus = load(name), folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for place, seed in enumerate(module.SEEDS):
        (corpus / f"seed-{place}").write_bytes(seed)
    lines = ["".join(f"\\x{byte:02x}" for byte in word) for word in module.WORDS]
    (folder / "words.dict").write_text("".join(f'"{line}"\n' for line in lines))
    before = set(folder.iterdir())
    options = [
        f"-max_total_time={int(seconds)}",
        f"-timeout={10 * SLOW_S}",  # of the clock: `timed` counts processor time
        f"-rss_limit_mb={MEMORY_MB}",
        f"-dict={folder / 'words.dict'}",
        f"-artifact_prefix={folder}/",
        "-max_len=16384",
        "-len_control=20",
        "-print_final_stats=1",
        str(corpus),
    ]
    command = [sys.executable, str(HERE / "run.py"), name, "--inner", *options]
    started = time.monotonic()
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", cwd=ROOT)
    took = time.monotonic() - started
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    counted = re.findall(r"number_of_executed_units: (\d+)", done.stderr) or re.findall(
        r"^#(\d+)", done.stderr, re.M
    )
    covered = re.findall(r"cov: (\d+)", done.stderr)
    findings = [
        path.name for path in sorted(set(folder.iterdir()) - before) if path.is_file() and "-" in path.name
    ]
    if done.returncode and not findings:
        findings = [f"exit code {done.returncode}, see {folder / 'log.txt'}"]
    return Row(
        name,
        "atheris",
        took,
        int(counted[-1]) if counted else 0,
        int(covered[-1]) if covered else 0,
        findings,
    )


def _fuzz(name: str, options: list[str]) -> None:
    """In a process of its own: libFuzzer takes it over."""
    import atheris

    source = (HERE / f"fuzz_{name}.py").read_text()
    others = re.findall(r'^INSTRUMENT = \("(\w+)",\)', source, re.MULTILINE)
    with atheris.instrument_imports(include=["build_engines", "calibration", "triton_repo", *others]):
        module = load(name)
        for seed in module.SEEDS:  # what is imported only when it is called
            module.target(seed)
    atheris.Setup([f"fuzz_{name}", *options], lambda data: timed(module.target, data))
    atheris.Fuzz()


def _run_hypothesis(name: str, seconds: float, folder: Path) -> Row:
    from examples import search

    folder.mkdir(parents=True, exist_ok=True)
    started, executions, findings = time.monotonic(), 0, []
    try:
        executions = search(load(name), seconds=seconds)
    except Exception as error:  # whatever the target lets out
        path = folder / f"crash-{int(time.time())}.txt"
        path.write_text("\n".join([repr(error), *getattr(error, "__notes__", [])]))
        findings.append(path.name)
    return Row(name, "hypothesis", time.monotonic() - started, executions, None, findings)


if __name__ == "__main__":
    main()
