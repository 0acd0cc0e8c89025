"""A server brought back after it died, as long as it does not die too often.

    supervisor = Supervisor(server, announce)
    while (fault := supervisor.fault()) is None: ...
    supervisor.recover(fault)

The ports stay the same. What is restarted is the whole server: Triton has no way to answer the requests that
were in flight at a model whose process died, and their clients are better off with a broken connection than
waiting.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from build_engines.errors import ServerError
from triton_repo.server import Server

_HEALTH_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How patient a supervisor is. The first crash is answered at once, each further one within `window_s`
    seconds after twice the delay of the one before, and the last that `crashes` allows not at all."""

    crashes: int = 5
    window_s: float = 600.0
    first_delay_s: float = 0.5
    most_delay_s: float = 8.0
    silent_s: float = 30.0  # without an answer to "are you alive?"


class CrashBudget:
    """When to start again after a crash, and when to give up. Times are seconds of one monotonic clock."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._crashes: deque[float] = deque()

    @property
    def spent(self) -> int:
        """Crashes within the window that ended with the last one."""
        return len(self._crashes)

    def crashed(self, now: float) -> float | None:
        """Seconds to wait before the next start; None when there is to be none."""
        policy = self._policy
        self._crashes.append(now)
        while now - self._crashes[0] > policy.window_s:
            self._crashes.popleft()
        if self.spent >= policy.crashes:
            return None
        if self.spent == 1:
            return 0.0
        return min(policy.first_delay_s * 2.0 ** (self.spent - 2), policy.most_delay_s)


@dataclass(frozen=True, slots=True)
class Restart:
    """What is announced before a start (`ready_s` None) and after it. `down_s`: since it was noticed."""

    fault: ServerError
    number: int
    delay_s: float
    down_s: float = 0.0
    ready_s: float | None = None


@dataclass
class Supervisor:
    """Watches one started server and brings it back. Use it from the thread that started the server."""

    server: Server
    announce: Callable[[Restart], None]
    policy: RestartPolicy = field(default_factory=RestartPolicy)

    def __post_init__(self) -> None:
        self._budget = CrashBudget(self.policy)
        # Not before it is asked for the first time: models may take minutes to load.
        self._heard: float | None = None
        self._listen_at = 0.0

    def fault(self) -> ServerError | None:
        """Why the server no longer serves: what `Server.fault` knows, or that it has gone silent."""
        if found := self.server.fault():
            return found
        now = time.monotonic()
        if self._heard is None:
            self._heard = now
        if now < self._listen_at:
            return None
        if self.server.answers():
            self._heard = now
        self._listen_at = time.monotonic() + _HEALTH_EVERY_S
        silent = time.monotonic() - self._heard
        if silent < self.policy.silent_s:
            return None
        return ServerError(
            f"tritonserver has not answered for {silent:.0f} s", next_step=f"read {self.server.log}"
        )

    def recover(self, fault: ServerError) -> None:
        """Start the server again. Raises ServerError, with what the log says, when the budget is spent."""
        noticed = time.monotonic()
        # Nobody waits for a server that does not even say that it lives.
        self.server.stop(None if self.server.answers() else 0)
        while True:
            delay = self._budget.crashed(time.monotonic())
            if delay is None:
                raise self._given_up(fault)
            restart = Restart(fault, self._budget.spent, delay)
            self.announce(restart)
            time.sleep(delay)
            started = time.monotonic()
            try:
                self.server.restart()
            except ServerError as error:
                fault = error
                continue
            self._heard = self._listen_at = now = time.monotonic()
            self.announce(Restart(fault, restart.number, delay, now - noticed, now - started))
            return

    def _given_up(self, fault: ServerError) -> ServerError:
        log, policy = self.server.log, self.policy
        return ServerError(
            f"given up after {self._budget.spent} crashes within {policy.window_s:.0f} s; "
            f"the last: {fault.message}",
            cause=fault.cause,
            next_step=f"read {log} and, for the crashes before, {log.name}.1 and following beside it",
        )
