"""Replace a folder or a file as a whole: readers see the old one or the new one, never a mixture."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from build_engines.errors import ArtifactError, BusyError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def replaced_folder(out: Path, ours: str | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `out`, on an error it vanishes.

    `ours` is for folders that users name: a pattern that every folder of the kind has a match of. One without
    is somebody's own, and neither it nor a file is replaced: ArtifactError.
    """
    if ours:
        _require_ours(out, ours)
    with folder_aside(out) as aside:
        yield aside
        _swap(aside, out.absolute())


@contextlib.contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, which nobody else writes meanwhile; it is removed at the end.

    A lock beside `out` keeps a second writer away; the kernel frees it when its holder dies, so whatever a
    killed run left aside is known to be rubbish and is removed by the next run.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent / f".{out.name}.lock", f"{out} is being written by another process"):
        for leftover in out.parent.glob(f".{out.name}.aside-*"):
            _remove(leftover)
        aside = out.parent / f".{out.name}.aside-{os.getpid()}"
        aside.mkdir()
        try:
            yield aside
        finally:
            with contextlib.suppress(OSError):
                _remove(aside)


def _require_ours(out: Path, ours: str) -> None:
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file, and a folder is to be written", next_step="name another place")
    if out.is_dir() and any(out.iterdir()) and not any(out.glob(ours)):
        raise ArtifactError(
            f"{out} holds other files, which would be deleted: what is written replaces a folder as a whole",
            next_step="name a new or an empty folder",
        )


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file aside and rename it. `mode` less the umask holds from the first moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def link_or_copy(source: Path, destination: Path) -> None:
    """A hard link where the file system allows one, otherwise a copy."""
    try:
        # Of a link, what it leads to: one with a relative path leads nowhere from another folder.
        os.link(os.path.realpath(source), destination)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES}:
            raise
        shutil.copyfile(source, destination)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path`; BusyError(`busy`) if another process does. A dead holder's lock is free."""
    # Not through a link that somebody put there: what it leads to would be made, or held.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(busy, next_step="wait for it, then run again") from None
        yield


def _remove(path: Path) -> None:
    """A folder with all that is in it; of a link the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _swap(aside: Path, out: Path) -> None:
    """Put `aside` in the place of `out`; what was there ends up in `aside`."""
    if not os.path.lexists(out):
        aside.rename(out)
        return
    if not _exchange(aside, out):
        # No atomic exchange on this system: for a moment there is no `out`.
        retired = aside.with_name(f"{aside.name}-old")
        out.rename(retired)
        aside.rename(out)
        retired.rename(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically (Linux renameat2); False where that does not exist."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(second))
