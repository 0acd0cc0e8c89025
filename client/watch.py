"""A limit on each wait of a stream that has only one for its whole life."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable


class Watch:
    """Calls `expire` once when a wait outlasts its limit; a thread of its own, until `stop` or then.

    A wait costs no wake-up of that thread: it sleeps until the moment that was the limit when it last looked.
    """

    def __init__(self, expire: Callable[[], object]) -> None:
        self.expired = False
        self._expire = expire
        self._due: float | None = math.inf
        self._wakes = math.inf
        self._condition = threading.Condition()
        threading.Thread(target=self._run, name="onecard-client-watch", daemon=True).start()

    def begin(self, seconds: float) -> None:
        with self._condition:
            if self._due is not None:
                self._due = time.monotonic() + seconds
                if self._due < self._wakes:
                    self._condition.notify()

    def end(self) -> None:
        with self._condition:
            if self._due is not None:
                self._due = math.inf

    def stop(self) -> None:
        with self._condition:
            self._due = None
            self._condition.notify()

    def _run(self) -> None:
        with self._condition:
            while self._due is not None:
                left = self._due - time.monotonic()
                if left <= 0:
                    self.expired = True
                    self._expire()
                    return
                # A limit that was lifted is looked at again when it would have been reached.
                self._wakes = self._due
                self._condition.wait(None if math.isinf(left) else left)
