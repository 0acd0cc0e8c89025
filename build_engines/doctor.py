"""What of this machine the build and the server rely on: one small check each, over facts gathered once.

`examine_machine` gathers the facts; each check turns some into a finding and asks nothing itself. Checks of a
stack are in `build_engines.doctor_stack`, those of the server in `triton_repo.doctor`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from build_engines import host, nvidia
from build_engines.cards import MIB, PORTABLE_FROM, capability_at_least
from build_engines.errors import CompileError
from build_engines.findings import Finding, State
from build_engines.gpu_here import GpuHere
from triton_repo.runtime.gpu.cuda import DeviceInfo, find_device

if TYPE_CHECKING:
    from build_engines.plan import Plan
    from build_engines.stack import Stack

GIB: Final = 1 << 30
_PYTHONS: Final = ((3, 11), (3, 12))
# Without these nothing can be built or served; the others are for the demo, the benchmarks and development.
_NEEDED_EXTRAS: Final = ("serve", "build")
# Each is the same module as the package of an extra.
_INSTEAD: Final = {"onnxruntime": "onnxruntime-gpu"}
# A build of BERT-base, PyTorch and the graph beside each other, took 3.8 GiB, and 1.7 on disk.
_LEAST_MEMORY: Final = 4 * GIB
_LEAST_DISK: Final = 2 * GIB
_PCI: Final = Path("/sys/bus/pci/devices")
_ROOT: Final = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a stack asks of the machine: bytes of disk yet to be written, and of memory."""

    disk: int = 0
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The first GPU, or why there is none. `unusable`: why this process cannot compute on it.

    `on_bus`: an NVIDIA device is in the machine, whether its driver answers or not.
    """

    card: nvidia.Card | None
    reason: str = ""
    free: int | None = None
    unusable: str = ""
    on_bus: bool = False


def examine_machine(
    folder: Path, needs: Needs, stack: Stack | None = None, plan: Plan | None = None
) -> list[Finding]:
    """Every check of this machine; a build would write into `folder`. A GPU is held against the stack's."""
    project = read_project(_ROOT)
    installed = installed_versions(project)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    gpu = _find_gpu()
    return [
        check_system(platform.system(), platform.machine()),
        check_python(sys.version_info[:3], sys.executable),
        check_environment(sys.prefix != sys.base_prefix, _is_managed(), sys.prefix),
        check_pins(installed, project.pins),
        check_extras(installed, project.extras),
        check_one_onnxruntime(installed),
        check_cpu(host.cpu_name(), host.cores(), host.cpu_flags()),
        check_memory(host.available_bytes(), host.memory_bytes(), needs.memory),
        check_disk(folder, shutil.disk_usage(place).free, needs.disk),
        check_driver(gpu),
        check_gpu(gpu, stack, plan),
    ]


def check_system(system: str, machine: str) -> Finding:
    found = f"{system} on {machine}"
    if (system, machine) != ("Linux", "x86_64"):
        return Finding(
            "system", "problem", f"{found}; Triton and the engines are for Linux on x86-64", "use one"
        )
    return Finding("system", "ok", found)


def check_python(version: Sequence[int], executable: str) -> Finding:
    found = f"{'.'.join(map(str, version))} at {executable}"
    if tuple(version[:2]) not in _PYTHONS:
        do = "make PYTHON=/path/to/python3.12 setup"
        return Finding("python", "problem", f"{found}; 3.11 or 3.12 is needed", do)
    return Finding("python", "ok", found)


def check_environment(is_own: bool, is_managed: bool, prefix: str) -> Finding:
    """A virtual environment of its own; `is_managed`: pip may not install into this Python."""
    if is_own:
        return Finding("environment", "ok", prefix)
    found = f"no virtual environment: packages are those of {prefix}"
    if is_managed:
        found += ", which belongs to the distribution"
    return Finding("environment", "warning", found, "make setup, then use .venv/bin/build-engines")


def check_pins(installed: Mapping[str, str], pins: Mapping[str, str]) -> Finding:
    """Installed versions against constraints.txt; "+cpu" and the like do not count."""
    if not pins:
        return Finding("packages", "skipped", "there is no constraints.txt: this is not a checkout")
    others = {
        name: version
        for name, version in installed.items()
        if name in pins and version.partition("+")[0] != pins[name].partition("+")[0]
    }
    if not others:
        return Finding("packages", "ok", f"{len(installed.keys() & pins.keys())} installed, all as pinned")
    shown = ", ".join(f"{name} {version} (pinned {pins[name]})" for name, version in sorted(others.items()))
    wanted = " ".join(f"{name}=={pins[name]}" for name in sorted(others))
    return Finding("packages", "warning", f"not as pinned: {shown}", f"{_pip()} install {wanted}")


def check_extras(installed: Mapping[str, str], extras: Mapping[str, Sequence[str]]) -> Finding:
    if not extras:
        return Finding("extras", "skipped", "there is no pyproject.toml: this is not a checkout")
    missing = {
        extra: absent
        for extra, names in extras.items()
        if (absent := [name for name in names if not _has(installed, name)])
    }
    if not missing:
        return Finding("extras", "ok", f"all installed: {', '.join(extras)}")
    shown = "; ".join(f"{extra} ({', '.join(names)})" for extra, names in missing.items())
    do = f"{_pip()} install -c constraints.txt -e '.[{','.join(missing)}]'"
    needed = [extra for extra in missing if extra in _NEEDED_EXTRAS]
    return Finding("extras", "warning" if needed else "ok", f"missing from: {shown}", do)


def check_one_onnxruntime(installed: Mapping[str, str]) -> Finding:
    """Two packages are one Python module: whichever came last is half overwritten."""
    here = [name for name in ("onnxruntime", "onnxruntime-gpu") if name in installed]
    if len(here) > 1:
        do = f"{_pip()} uninstall --yes onnxruntime onnxruntime-gpu, then install the one that is wanted"
        return Finding("onnxruntime", "problem", "onnxruntime and onnxruntime-gpu are both installed", do)
    if not here:
        return Finding("onnxruntime", "skipped", "not installed")
    return Finding("onnxruntime", "ok", f"{here[0]} {installed[here[0]]}")


def check_cpu(name: str, cores: int, flags: frozenset[str]) -> Finding:
    vnni = sorted(flag for flag in flags if "vnni" in flag)
    found = f"{name}, {cores} cores"
    if not vnni:
        found += ", no VNNI: INT8 engines of the CPU take exact kernels, which are slower"
        return Finding("cpu", "warning", found, "compare before choosing INT8: build-engines measure STACK")
    return Finding("cpu", "ok", f"{found}, {', '.join(vnni)}")


def check_memory(available: int, total: int, needed: int) -> Finding:
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    least = max(needed, _LEAST_MEMORY)
    if available < least:
        found += f", {least / GIB:.1f} are needed"
        return Finding(
            "memory", "warning", found, "stop what else runs (ps aux --sort=-rss | head), or add memory"
        )
    return Finding("memory", "ok", found)


def check_disk(folder: Path, free: int, needed: int) -> Finding:
    found = f"{free / GIB:.1f} GiB free for {folder}"
    if needed:
        found += f", about {needed / GIB:.1f} yet to be written"
    if free < needed:
        do = f"make room for {(needed - free) / GIB:.1f} GiB more, or name another folder with --build-dir"
        return Finding("disk", "problem", found, do)
    if free < _LEAST_DISK:
        return Finding(
            "disk", "warning", found, f"see what fills it: du -xh --max-depth=2 {folder} | sort -h"
        )
    return Finding("disk", "ok", found)


def check_driver(gpu: Gpu) -> Finding:
    if gpu.card is not None:
        return Finding("driver", "ok", f"{gpu.card.driver}, for CUDA up to {gpu.card.driver_cuda}")
    if gpu.on_bus:
        found = f"an NVIDIA device is on the bus, but {gpu.reason}"
        return Finding("driver", "warning", found, "install the driver (nvidia-smi then lists the card)")
    return Finding("driver", "skipped", gpu.reason)


def check_gpu(gpu: Gpu, stack: Stack | None, plan: Plan | None) -> Finding:
    """The GPU against the stack's card, and what is free on it against the plan."""
    on_gpu = [target for target in stack.targets if target != "onnxruntime"] if stack else []
    card = gpu.card
    if card is None:
        names = f"; engines for {', '.join(on_gpu)} are neither judged nor served here" if on_gpu else ""
        return Finding("gpu", "skipped", f"none{names}")
    here = GpuHere(card.name, card.compute_capability, card.total_bytes, gpu.free)
    if gpu.unusable:
        state: State = "problem" if on_gpu else "warning"
        found = f"{card.name} cannot be used: {gpu.unusable}"
        return Finding(
            "gpu", state, found, f"{_pip()} install -c constraints.txt -e '.[trt-rtx]'", CompileError
        )
    if stack is None or plan is None or not on_gpu:
        return Finding("gpu", "ok", here.line())
    if stack.portable and capability_at_least(card.compute_capability, PORTABLE_FROM):
        return Finding("gpu", "ok", f"{here.line()}; the stack's engines are portable")
    differences = here.differences(plan)
    if not differences:
        return Finding("gpu", "ok", f"{here.line()}; the stack's card")
    do = "stop what holds its memory (nvidia-smi shows it)"
    if card.compute_capability != plan.card.compute_capability:
        size, capability = card.total_bytes // MIB, card.compute_capability
        do = f'for this GPU write card = {{ memory_mib = {size}, compute_capability = "{capability}" }}'
    return Finding("gpu", "warning", "; ".join([here.line(), *differences]), do)


@dataclass(frozen=True, slots=True)
class Project:
    """What the checkout asks for: pinned versions, and the packages of each extra. Names as in an index."""

    pins: dict[str, str]
    extras: dict[str, list[str]]


def read_project(root: Path) -> Project:
    """constraints.txt and pyproject.toml in `root`; empty where the code lies without them."""
    extras: dict[str, list[str]] = {}
    lines: list[str] = []
    if (path := root / "pyproject.toml").is_file():
        extras = tomllib.loads(path.read_text("utf-8"))["project"]["optional-dependencies"]
        lines += [requirement for names in extras.values() for requirement in names]
    if (path := root / "constraints.txt").is_file():
        lines += path.read_text("utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return Project(
        pins={_name(name): version.strip() for name, equal, version in pairs if equal},
        extras={extra: [_name(requirement) for requirement in names] for extra, names in extras.items()},
    )


def installed_versions(project: Project) -> dict[str, str]:
    """Those of the project's packages that are installed, and of what may take their place."""
    names = {
        *project.pins,
        *(name for found in project.extras.values() for name in found),
        *_INSTEAD.values(),
    }
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _has(installed: Mapping[str, str], name: str) -> bool:
    return name in installed or _INSTEAD.get(name) in installed


def _name(requirement: str) -> str:
    """A requirement's package: "tritonclient[grpc]" and "ml_dtypes==0.5" are tritonclient and ml-dtypes."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


def _pip() -> str:
    return f"{sys.executable} -m pip"


def _is_managed() -> bool:
    return (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()


def _find_gpu() -> Gpu:
    try:
        card = nvidia.find_card()
    except nvidia.NoGpu as reason:
        return Gpu(card=None, reason=str(reason), on_bus=_on_bus(_PCI))
    found = find_device()
    unusable = "" if isinstance(found, DeviceInfo) else found.reason
    return Gpu(card=card, free=nvidia.free_bytes(card), unusable=unusable, on_bus=True)


def _on_bus(devices: Path) -> bool:
    """Whether a display or compute device of NVIDIA is plugged in."""
    for device in devices.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
    return False
