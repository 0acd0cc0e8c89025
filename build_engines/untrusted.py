"""Bounds on the files of a checkpoint, checked before memory is taken for them (docs/security.md).

A checkpoint comes from whoever uploaded it. Every size in it is a claim: a file may be larger than memory, a
small one may ask for more than there is, and a name may be that of a pipe that never ends.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from build_engines.errors import OnecardError

# Settings: config.json, modules.json, the index of the shards. The largest known index has 10 MB.
MAX_JSON_BYTES: Final = 16 << 20
# Commas and brackets of such a file. Each stands for a value at most, and a value takes up to 100 bytes.
MAX_JSON_VALUES: Final = 1 << 20
# Vocabularies: tokenizer.json, vocab.txt, sentencepiece's models. Gemma's, the largest known, has 33 MB.
MAX_VOCABULARY_BYTES: Final = 128 << 20
# Files of a checkpoint's folder, those that are not read too.
MAX_FILES: Final = 4096

_VOCABULARIES: Final = (".txt", ".model", ".spm", ".vocab")
_VOCABULARY_NAMES: Final = ("tokenizer.json", "vocab.json", "added_tokens.json")
_MEBIBYTE: Final = 1 << 20


class Refused(ValueError):
    """Why a file is not read; completes "<file>: ..."."""


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        Refused: it is larger, or no regular file.
        OSError: it cannot be read.
    """
    # A pipe would block before anything could be asked about it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Refused("is no regular file")
        if found.st_size > limit:
            raise Refused(_too_large(found.st_size, limit))
        content = file.read(limit + 1)
    if len(content) > limit:  # it grew
        raise Refused(_too_large(len(content), limit))
    return content


def read_json(path: Path, error: type[OnecardError], limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON value in `path`.

    Raises:
        OnecardError: of the class `error`: unreadable, too large, no JSON, or nested too deeply.
    """
    try:
        content = read_bounded(path, limit)
        values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
        if values > MAX_JSON_VALUES:
            raise Refused(f"has {values:,} values, more than {MAX_JSON_VALUES:,}")
        return json.loads(content)
    except Refused as refused:
        raise error(
            f"{path}: {refused}",
            cause="no checkpoint has such a file; it is damaged or hostile",
            next_step="fetch the checkpoint again, or name another one",
        ) from None
    except OSError as failed:
        raise error(f"{path}: cannot be read: {failed.strerror or failed}") from None
    except (ValueError, RecursionError) as wrong:
        raise error(
            f"{path}: not valid JSON: {str(wrong)[:200]}",
            cause="the file was cut short, or edited by hand",
            next_step="fetch the checkpoint again, or correct the file",
        ) from None


def check_count(source: str, files: int, error: type[OnecardError]) -> None:
    """Raise `error` for more files than a checkpoint has."""
    if files > MAX_FILES:
        raise error(
            f"{source}: more than {MAX_FILES:,} files",
            cause="this is not the folder of one checkpoint",
            next_step="name the folder with config.json",
        )


def check_sizes(source: str, sizes: Mapping[str, int], error: type[OnecardError]) -> None:
    """Raise `error` for a file of settings or vocabulary that is too large.

    `sizes`: bytes by file name, as the folder or the hub lists them; weights may be of any size.
    """
    for name, size in sizes.items():
        limit = _limit(name)
        if limit is not None and size > limit:
            raise error(
                f"{source}: {name} {_too_large(size, limit)}",
                cause="no checkpoint has such a file; it is damaged or hostile",
                next_step="name another checkpoint in the stack file",
            )


def _limit(name: str) -> int | None:
    base = PurePosixPath(name).name
    if base.endswith(_VOCABULARIES) or base in _VOCABULARY_NAMES:
        return MAX_VOCABULARY_BYTES
    return MAX_JSON_BYTES if base.endswith((".json", ".jinja")) else None


def _too_large(size: int, limit: int) -> str:
    return f"has {size:,} bytes, more than {limit // _MEBIBYTE} MiB"
