"""CUDA graphs of runs that come again: a run that has come often is recorded, then launched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from triton_repo.runtime.gpu.cuda import Device, Graph
from triton_repo.runtime.session import EngineRefused
from triton_repo.runtime.texts import EngineFailed

Work = Callable[[], None]

# A graph takes some memory of the GPU for each kernel, and its context some more, which no plan counts.
MAX_GRAPHS = 16
# To make a context and to record it takes as long as many runs; a graph saves the launches of one.
RUNS_BEFORE = 16


class GraphCache:
    """At most `limit` graphs of one device; the one that was not used for longest gives way."""

    def __init__(self, device: Device, limit: int = MAX_GRAPHS, runs_before: int = RUNS_BEFORE) -> None:
        """A run is recorded when it has come `runs_before` times."""
        self._device, self._limit, self._before = device, limit, runs_before
        # The work that was recorded stays with its graph: the graph needs what it works on.
        self._graphs: OrderedDict[Hashable, tuple[Graph, Work]] = OrderedDict()
        self._runs: OrderedDict[Hashable, int] = OrderedDict()  # that are no graphs, or cannot be one

    def run(self, key: Hashable, work: Work, prepare: Callable[[], Work]) -> None:
        """Do `work`, or launch its graph. `key` holds all that the recorded calls depend on.

        Args:
            prepare: makes the same work over a context of its own, which nothing changes afterwards.

        Raises what `work` raises when it is done; a recording that fails is not tried again.
        """
        if recorded := self._graphs.get(key):
            self._graphs.move_to_end(key)
            recorded[0].launch()
            return
        runs = self._runs.pop(key, 0)
        if runs == self._before and self._record(key, prepare):
            return
        self._count(key, runs + 1)
        work()

    def close(self) -> None:
        """Destroy every graph, once the device has finished with them."""
        if self._graphs:
            self._device.synchronize()
        while self._graphs:
            self._graphs.popitem()[1][0].close()
        self._runs.clear()

    def __len__(self) -> int:
        return len(self._graphs)

    def _count(self, key: Hashable, runs: int) -> None:
        self._runs[key] = runs
        if len(self._runs) > 8 * self._limit:
            self._runs.popitem(last=False)

    def _record(self, key: Hashable, prepare: Callable[[], Work]) -> bool:
        """Run and record; False where not even the run was done."""
        try:
            work = prepare()
            # TensorRT finishes what new shapes leave to do in the first run, which must not be recorded.
            work()
        except (EngineFailed, EngineRefused):
            return False
        try:
            graph = self._device.capture(work)
        except EngineFailed:
            self._count(key, self._before + 1)
            return True
        self._graphs[key] = graph, work
        if len(self._graphs) > self._limit:
            _, (oldest, _) = self._graphs.popitem(last=False)
            self._device.synchronize()
            oldest.close()
        return True
