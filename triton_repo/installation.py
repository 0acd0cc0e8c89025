"""Find a tritonserver and everything its Python backend needs, or say what is missing and how to get it.

Two places are known: `tritonserver` on PATH (NVIDIA's container, a system installation), and the one inside
the nvidia-pytriton wheel, whose Python-backend stub must be put together for the running Python.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from build_engines.errors import ServerError

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB = "triton_python_backend_stub"
# Read from the environment by libraries inside the server; a value meant for the caller's own numerical code
# would make every model instance start that many threads.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
)


@dataclass(frozen=True, slots=True)
class Installation:
    """A tritonserver to run; `None` folders are left at the server's own defaults."""

    binary: Path
    backends: Path | None
    caches: Path | None
    libraries: tuple[Path, ...]
    origin: str

    def environment(self) -> dict[str, str]:
        """The environment to start it in: this one, less what would disturb it."""
        environment = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
        # The models compute in ONNX Runtime's own threads; BLAS is never called there.
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        for name in ("PYTHONHOME", "PYTHONSTARTUP", "PYTHONPATH"):
            environment.pop(name, None)
        if self.libraries:
            inherited = environment.get("LD_LIBRARY_PATH")
            paths = [str(path) for path in self.libraries] + ([inherited] if inherited else [])
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
        if self.origin == "nvidia-pytriton":
            # The stub embeds an isolated Python, which ignores PYTHONPATH and PYTHONHOME and finds its
            # packages from the first python3 on PATH: this environment's must be that.
            environment["PATH"] = os.pathsep.join(
                [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
            )
        return environment


def find_installation(work: Path, binary: Path | None = None) -> Installation:
    """tritonserver as given, from PATH, or from the wheel (whose backend folder is laid out under `work`).

    Raises ServerError naming the missing piece and the command that installs it.
    """
    found = binary or _which("tritonserver")
    if found is not None:
        return _installed(found)
    wheel = _wheel()
    if wheel is None:
        raise ServerError(
            "no tritonserver found, neither on PATH nor in this Python environment",
            next_step="pip install nvidia-pytriton, or run inside NVIDIA's tritonserver container",
        )
    _require_numpy_1()
    return Installation(
        binary=wheel / "bin" / "tritonserver",
        backends=_lay_out_backends(wheel, work),
        caches=wheel / "caches",
        libraries=(_bundled_libraries(wheel), shared_python().parent),
        origin="nvidia-pytriton",
    )


def shared_python() -> Path:
    """The shared library of the running Python, which the Python backend's stub is linked to."""
    name = f"libpython{_PYTHON}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    folders += [f"/usr/lib/{multiarch}"] if multiarch else []
    folders += ["/usr/lib64", "/usr/lib", "/usr/local/lib"]
    for folder in folders:
        if folder and (path := Path(folder) / name).exists():
            return path
    raise ServerError(
        f"{name} is missing: Triton's Python backend is linked to it",
        cause=f"{sys.base_prefix} holds a Python that was built without its shared library",
        next_step=f"install it (Debian, Ubuntu: apt install libpython{_PYTHON}; "
        f"Fedora: dnf install python3-libs; "
        f"pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install {_PYTHON}), or take a Python that "
        f"has it (uv python install {_PYTHON}; conda), and make the environment again",
    )


def _which(name: str) -> Path | None:
    path = shutil.which(name)
    return Path(path) if path else None


def _wheel() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "tritonserver"
        if (folder / "bin" / "tritonserver").exists():
            return folder
    return None


def _require_numpy_1() -> None:
    """The wheel's Python backend was built against numpy 1; with another its models die of signal 11."""
    import numpy

    if int(numpy.__version__.split(".")[0]) > 1:
        raise ServerError(
            f"the tritonserver of nvidia-pytriton crashes with numpy {numpy.__version__}",
            cause="its Python backend was built against numpy 1",
            next_step="pip install 'numpy<2', or run inside NVIDIA's tritonserver container",
        )


def _bundled_libraries(wheel: Path) -> Path:
    folder = wheel.parent.parent / "nvidia_pytriton.libs"
    if not folder.is_dir():
        raise ServerError(
            f"{folder} is missing", next_step="pip install --force-reinstall --no-deps nvidia-pytriton"
        )
    return folder


def _lay_out_backends(wheel: Path, work: Path) -> Path:
    """A backend folder of links, with the stub that was built for the running Python."""
    stubs = wheel / "python_backend_stubs"
    stub = stubs / _PYTHON / _STUB
    if not stub.exists():
        known = ", ".join(sorted(path.name for path in stubs.iterdir())) if stubs.is_dir() else "none"
        raise ServerError(
            f"nvidia-pytriton has no Python-backend stub for Python {_PYTHON}",
            cause=f"it carries stubs for {known}",
            next_step="use Python 3.11 or 3.12",
        )
    python = work / "backends" / "python"
    python.mkdir(parents=True)
    for source in (*(wheel / "backends" / "python").glob("*.*"), stub):
        (python / source.name).symlink_to(source)
    return python.parent


def _installed(binary: Path) -> Installation:
    """A complete installation; its stub must be for a Python that has the runtime's libraries."""
    root = binary.resolve().parent.parent
    stub = root / "backends" / "python" / _STUB
    if (root / "backends").is_dir() and not stub.exists():
        raise ServerError(
            f"{binary} has no Python backend ({stub} is missing)",
            next_step="use NVIDIA's full tritonserver image (tag ending in -py3)",
        )
    version = _stub_python(stub) if stub.exists() else None
    if version not in {None, _PYTHON}:
        raise ServerError(
            f"the Python backend of {binary} runs Python {version}, this environment is Python {_PYTHON}",
            next_step=f"make the environment with Python {version}, or take {binary} off PATH",
        )
    return Installation(binary, None, None, (), "PATH")


def _stub_python(stub: Path) -> str | None:
    """The Python version a stub is linked to, from the name of the library it needs."""
    match = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    return match[1].decode() if match else None
