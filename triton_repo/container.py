"""The `docker run` command that serves a repository in NVIDIA's tritonserver container."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path

from triton_repo.server import ServerOptions, served_models, uses_cache

# Python 3.12 inside, which the served runtime needs (3.11 or newer).
IMAGE = "nvcr.io/nvidia/tritonserver:25.08-py3"
# Distribution by engine target, beside tokenizers.
_ENGINE_LIBRARY = {
    "onnxruntime": "onnxruntime",
    "tensorrt-rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt",
}


def docker_command(repository: Path, options: ServerOptions, image: str = IMAGE) -> list[str]:
    """The command's words. The engine libraries are pinned to the versions that built the engines, as an
    engine runs under no other; models that compute on the CPU need no GPU and get none."""
    repository = repository.absolute()
    targets = _targets(repository)
    gpu = any(target != "onnxruntime" for target in targets)
    inside = [
        "tritonserver",
        "--model-repository=/models",
        "--disable-auto-complete-config",
        *([f"--cache-config=local,size={options.cache_mib << 20}"] if uses_cache(repository) else []),
    ]
    install = ["pip", "install", "--quiet", *_requirements(repository, targets)]
    return [
        *("docker", "run", "--rm", "--init"),
        *(("--gpus", "all") if gpu else ()),
        "--shm-size=1g",
        *_published(options),
        # The image's Python is marked as managed by its distribution.
        *("-e", "PIP_BREAK_SYSTEM_PACKAGES=1"),
        *("-v", f"{repository}:/models:ro"),
        image,
        *("bash", "-c", f"{shlex.join(install)} && exec {shlex.join(inside)}"),
    ]


def _published(options: ServerOptions) -> list[str]:
    inner = {"http": 8000, "grpc": 8001, "metrics": 8002}
    words = []
    for name, port in options.ports.named().items():
        words += ["-p", f"{options.host}:{port}:{inner[name]}"]
    return words


def _manifests(repository: Path) -> list[dict[str, object]]:
    paths = [repository / name / "1" / "manifest.json" for name in served_models(repository)]
    return [json.loads(path.read_text("utf-8")) for path in paths]


def _targets(repository: Path) -> list[str]:
    return sorted({str(manifest["target"]) for manifest in _manifests(repository)})


def _requirements(repository: Path, targets: list[str]) -> list[str]:
    pinned: dict[str, str] = {}
    for manifest in _manifests(repository):
        versions = manifest.get("versions")
        if isinstance(versions, dict):
            pinned |= {str(name).replace("_", "-"): str(version) for name, version in versions.items()}
    # Chat templates are Jinja's.
    generates = any(manifest.get("task") == "generate" for manifest in _manifests(repository))
    names = ["tokenizers", *(["jinja2"] if generates else [])]
    names += [_ENGINE_LIBRARY[target] for target in targets]
    return [_requirement(name, pinned.get(name)) for name in names]


def _requirement(name: str, version: str | None) -> str:
    if version is None:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return name
    return f"{name}=={version}"
