"""What tritonserver's log says: which models are ready, why one failed, whether a port was taken."""

from __future__ import annotations

import json
import re
from pathlib import Path

from triton_repo import json_log

_LOADED = re.compile(r"successfully loaded '([^']+)'")
_FAILED = re.compile(r"failed to load '([^']+)' version \d+: (.*)")
_STATE = re.compile(r"version \d+ is at UNAVAILABLE state: (.*)", re.DOTALL)
_CONFIG = re.compile(r"Poll failed for model directory '([^']+)': (.*)|failed to poll.*'([^']+)': (.*)")
_PORT_TAKEN = re.compile(r"failed to start (\w+) service: .*in use", re.IGNORECASE)
_ERROR = re.compile(r"^(?:E\d{4} .*?\] |error: )(.*)$", re.MULTILINE)

NO_GPU = "it is for a GPU, and Triton finds none here (no driver, or a container started without --gpus)"


def read(path: Path) -> str:
    """The log so far, as Triton wrote it; of JSON lines, without the times. Empty where there is none."""
    try:
        log = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(map(_plain, log.splitlines())) if log.startswith('{"time": ') else log


def loaded(log: str) -> set[str]:
    """Models that are ready."""
    return set(_LOADED.findall(log))


def failures(log: str) -> dict[str, str]:
    """Reason by model name, without the Python traceback that Triton appends."""
    found = {}
    for model, reason in _FAILED.findall(log):
        found[model] = _first_part(reason)
    for match in _CONFIG.finditer(log):
        model, reason = match[1] or match[3], match[2] or match[4]
        found.setdefault(model, _first_part(reason))
    return found


def port_taken(log: str) -> bool:
    return _PORT_TAKEN.search(log) is not None


def last_errors(log: str, count: int = 5) -> list[str]:
    """The last error lines, for when no reason was recognised."""
    return [_first_part(line) for line in _ERROR.findall(log)][-count:]


def reason_of(message: str) -> str:
    """What a failed load request says, without what Triton puts around it."""
    found = _STATE.search(message)
    return _first_part((found[1] if found else message).split("\n\nAt:")[0].rstrip().rstrip(";"))


def _plain(line: str) -> str:
    try:
        return json_log.text(json.loads(line))
    except ValueError:  # one that is being written
        return line


def _first_part(reason: str) -> str:
    text = reason.rstrip().rstrip('"').split("\\n\\nAt:")[0].replace("\\n", "\n").replace('\\"', '"').strip()
    if "unsupported gpu id" in text:
        return NO_GPU
    if "backend library for backend 'tensorrt'" in text:
        return "this tritonserver has no TensorRT backend; NVIDIA's container has one (triton-repo container)"
    for prefix in ("Internal: ", "TritonModelException: ", "Invalid argument: "):
        text = text.removeprefix(prefix)
    return text
