"""The `docker run` command that serves a repository in NVIDIA's tritonserver container."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from build_engines.errors import ServerError
from triton_repo.repository import served_models, uses_cache
from triton_repo.running import ADMIN_HEADER, ADMIN_NAME
from triton_repo.server import RESTRICTED, ServerOptions
from triton_repo.versions import served_versions

# Python 3.12 inside, which the served runtime needs (3.11 or newer), and TensorRT 11.
IMAGE = "nvcr.io/nvidia/tritonserver:26.08-py3"
# The newest whose TensorRT-LLM is known: 1.2.1.
LLM_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
# Distributions by the target of an engine that the Python backend runs, beside tokenizers.
_ENGINE_LIBRARIES = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-cuda": ("onnxruntime-gpu", "cuda-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "cuda-bindings"),
    "tensorrt": ("tensorrt", "cuda-bindings"),
    "tensorrt-llm": (),
}
_CACHE = "/cache"
_AGAIN = "write the repository again: triton-repo write STACK"


def docker_command(repository: Path, options: ServerOptions, image: str | None = None) -> list[str]:
    """The command's words, with the image that has what `repository` needs unless one is named.

    The engine libraries are pinned to the versions that built the engines, as an engine runs under no other;
    an engine that Triton runs itself needs the image's own. Models that compute on the CPU need no GPU and
    get none.
    """
    repository = repository.absolute()
    manifests = _manifests(repository)
    targets = {str(manifest["target"]) for manifest in manifests.values()}
    gpu = bool(targets - {"onnxruntime"})
    if image is None:
        image = LLM_IMAGE if "tensorrt-llm" in targets else IMAGE
    inside = [
        "tritonserver",
        "--model-repository=/models",
        "--disable-auto-complete-config",
        # By name, as `triton-repo serve` does: a folder without a config would stop the start.
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in served_models(repository)),
        *([f"--cache-config=local,size={options.cache_mib << 20}"] if uses_cache(repository) else []),
    ]
    install = ["pip", "install", "--quiet", *_requirements(manifests)]
    # A key that nobody has: these APIs are closed there.
    key = "$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')"
    apis = ",".join(RESTRICTED)
    closed = (
        f'key="{key}" && exec {shlex.join(inside)} "--http-restricted-api={apis}:{ADMIN_HEADER}=$key"'
        f' "--grpc-restricted-protocol={apis}:{ADMIN_NAME}=$key"'
    )
    return [
        *("docker", "run", "--rm", "--init"),
        "--security-opt=no-new-privileges",
        *(("--gpus", "all") if gpu else ()),
        "--shm-size=1g",
        *_published(options),
        # The image's Python is marked as managed by its distribution.
        *("-e", "PIP_BREAK_SYSTEM_PACKAGES=1"),
        # Kernels that a GPU engine compiled for this card are kept from one start to the next.
        *(("-e", f"ONECARD_CACHE_DIR={_CACHE}", "-v", f"onecard-cache:{_CACHE}") if gpu else ()),
        *("-v", f"{repository}:/models:ro"),
        image,
        *("bash", "-c", f"{shlex.join(install)} && {closed}"),
    ]


def _published(options: ServerOptions) -> list[str]:
    inner = {"http": 8000, "grpc": 8001, "metrics": 8002}
    words = []
    for name, port in options.ports.named().items():
        words += ["-p", f"{options.host}:{port}:{inner[name]}"]
    return words


def _manifests(repository: Path) -> dict[Path, dict[str, object]]:
    """By version folder; an ensemble has none."""
    folders = [model.path(model.version) for model in served_versions(repository)]
    return {folder: _manifest(folder) for folder in folders if (folder / "manifest.json").exists()}


def _manifest(folder: Path) -> dict[str, object]:
    """Read without its digests, which the server checks: what it runs in need not be where this is asked."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        known = manifest["target"] in _ENGINE_LIBRARIES and manifest["engine"]["file"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ServerError(f"{path}: unreadable manifest ({error!r:.200})", next_step=_AGAIN) from None
    if not known:
        raise ServerError(f"{path}: a manifest for an unknown target", next_step=_AGAIN)
    return dict(manifest)


def _requirements(manifests: Mapping[Path, Mapping[str, object]]) -> list[str]:
    pinned: dict[str, str] = {}
    names = ["tokenizers"]
    for folder, manifest in manifests.items():
        versions = manifest.get("versions")
        if isinstance(versions, dict):
            pinned |= {str(name).replace("_", "-"): str(version) for name, version in versions.items()}
        if manifest.get("task") == "generate":
            names.append("jinja2")  # chat templates
        engine = manifest["engine"]
        runs_engine = (
            (folder / "model.py").exists() and isinstance(engine, dict) and (folder / engine["file"]).exists()
        )
        if runs_engine:
            names += _ENGINE_LIBRARIES[str(manifest["target"])]
    # TensorRT-LLM's image has these, in the versions that its Transformers bears.
    llm = any(manifest["target"] == "tensorrt-llm" for manifest in manifests.values())
    there = {"tokenizers", "jinja2"} if llm else set()
    return [name if name in there else _requirement(name, pinned.get(name)) for name in dict.fromkeys(names)]


def _requirement(name: str, version: str | None) -> str:
    if version is None:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return name
    return f"{name}=={version}"
