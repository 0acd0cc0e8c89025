"""Run something in a process of its own that may take little memory and time more than this one has."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1 << 20


def bounded(function: Callable[..., Any], *values: Any, mebibytes: int = 256, seconds: float = 5) -> Any:
    """What `function` returns, or raises here what it raised there.

    Raises MemoryError where it asked for more than `mebibytes` beyond what this process has, and TimeoutError
    beyond `seconds` of processor time, or where it only waits: what a bound that does not hold looks like.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            _limit(mebibytes, seconds)
            outcome = (True, function(*values))
        except BaseException as error:
            error.__traceback__ = error.__cause__ = error.__context__ = None
            outcome = (False, error)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps(outcome))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        raise TimeoutError(f"ended by {status} after {seconds} s of processor time, or out of memory")
    succeeded, found = pickle.loads(answer)
    if not succeeded:
        raise found
    return found


def _limit(mebibytes: int, seconds: float) -> None:
    sys.stderr.flush()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + mebibytes * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    used = time.process_time()
    whole = int(used + seconds + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))
    # And what only waits.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
