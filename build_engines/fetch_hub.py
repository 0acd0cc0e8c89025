"""One repository of the Hugging Face hub: its list of files, and downloads that resume where they stopped.

huggingface_hub answers what the hub knows, finds the token and builds the requests. The bytes are received
here, because it throws a partial file away when it fails, and a checkpoint of gigabytes should not start
again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from build_engines.errors import FetchError
from triton_repo.runtime.session import sha256

_CHUNK: Final = 1 << 20
_RETRIES: Final = 5
_TIMEOUT_S: Final = 30.0
OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`sha256` is None for small files, which the hub lists by size alone."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """One commit of a repository."""

    source: str
    commit: str
    files: dict[str, RemoteFile]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {name: file.size for name, file in self.files.items()}


def read_repository(source: str, revision: str | None) -> Repository:
    """The repository's files at `revision` (default: its main branch); FetchError where it cannot be had."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint()).model_info(source, revision=revision, files_metadata=True)
    except Exception as error:
        raise _explained(error, source, revision) from None
    files = {
        entry.rfilename: RemoteFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
        for entry in info.siblings or []
    }
    return Repository(source, str(info.sha), files)


def download(repository: Repository, file: RemoteFile, target: Path, on_bytes: OnBytes) -> str:
    """Receive one file into `target` and return its SHA-256; what an earlier run left in `<target>.part` is
    kept.

    `on_bytes` is told every count of bytes that arrives. Raises FetchError when the connection keeps
    breaking, the disk is full, or the content is not what the hub lists.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers

    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repository.source, file.name, revision=repository.commit, endpoint=_endpoint())
    # Compressed answers cannot be continued at a byte of the file.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    failures = 0
    part.touch()
    while part.stat().st_size != file.size:
        before = part.stat().st_size
        try:
            _receive(url, headers, part, file, on_bytes)
            broken: Exception | None = None
        except Exception as error:
            broken = error
            if not _is_transient(error):
                raise _explained(error, f"{repository.source}/{file.name}", repository.commit) from None
        failures = 0 if part.stat().st_size > before else failures + 1
        if part.stat().st_size != file.size:
            if failures >= _RETRIES:
                raise _interrupted(repository, file, part, broken)
            time.sleep(min(2**failures, 8) / 2)
    digest = sha256(part)
    if file.sha256 is not None and digest != file.sha256:
        part.unlink()
        raise FetchError(
            f"{repository.source}/{file.name}: the SHA-256 is {digest}, the hub lists {file.sha256}",
            cause="the download was altered or damaged on its way; it has been removed",
            next_step="run the same command again",
        )
    part.replace(target)
    return digest


def _receive(url: str, headers: dict[str, str], part: Path, file: RemoteFile, on_bytes: OnBytes) -> None:
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    have = part.stat().st_size
    if have > file.size:
        # Left by a file of another length; nothing of it can be trusted.
        part.write_bytes(b"")
        have = 0
    if have:
        headers = {**headers, "Range": f"bytes={have}-"}
    with get_session().stream(
        "GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        resumed = have > 0 and response.status_code == 206
        if have and not resumed:
            on_bytes(-have)
        received = have if resumed else 0
        with part.open("ab" if resumed else "wb") as out:
            for chunk in response.iter_bytes(_CHUNK):
                received += len(chunk)
                if received > file.size:
                    raise FetchError(
                        f"{file.name}: the hub sends more than the {file.size:,} bytes it lists",
                        next_step="run the same command again",
                    )
                out.write(chunk)
                on_bytes(len(chunk))


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now: huggingface_hub reads it only when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _is_transient(error: Exception) -> bool:
    """A broken connection, or a server that says to come back; anything else will not get better."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in {408, 429, 500, 502, 503, 504}
    return not isinstance(error, FetchError) and _is_connection(error)


def _is_connection(error: Exception) -> bool:
    from huggingface_hub import errors

    transport: Any = vars(errors)["HTTPError"]
    return isinstance(error, transport | ConnectionError | TimeoutError)


def _interrupted(repository: Repository, file: RemoteFile, part: Path, error: Exception | None) -> FetchError:
    have = part.stat().st_size
    detail = f": {error}" if error else ""
    return FetchError(
        f"{repository.source}/{file.name}: interrupted after {have:,} of {file.size:,} bytes{detail}",
        cause="the connection to the hub keeps breaking",
        next_step="run the same command again; it goes on from there",
    )


def _explained(error: Exception, what: str, revision: str | None) -> FetchError:
    """Why the hub did not answer, in the words of someone who has to do something about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, FetchError):
        return error
    if isinstance(error, GatedRepoError):
        cause, step = "its owner asks for an agreement", "accept it on the model's page, then set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        cause, step = f"it has no revision {revision!r}", "correct `revision` in the stack file"
    elif isinstance(error, RepositoryNotFoundError):
        cause = "there is no such repository, or it is private and HF_TOKEN is not set or does not allow it"
        step = 'correct `source` (a folder must start with "./", "../" or "/"), or set HF_TOKEN'
    elif isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        cause = f"the hub answered {code}"
        step = "set HF_TOKEN to a token that may read it" if code in {401, 403} else "try again later"
    elif isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        cause, step = "the disk is full", "make room, then run the same command again; it goes on from there"
    elif _is_connection(error):
        cause = f"the hub cannot be reached: {error}"
        step = "check the network (HTTPS_PROXY, HF_ENDPOINT), or use --offline with what was fetched before"
    else:
        cause, step = f"{type(error).__name__}: {str(error)[:300]}", "check `source` in the stack file"
    return FetchError(f"{what}: cannot be fetched", cause=cause, next_step=step)
