"""CUDA graphs of runs that come again: a run is recorded when it comes a second time, then launched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from triton_repo.runtime.gpu.cuda import Device, Graph
from triton_repo.runtime.texts import EngineFailed

# A graph takes some memory of the GPU for each kernel, which no plan counts.
MAX_GRAPHS = 32


class GraphCache:
    """At most `limit` graphs of one device; the one that was not used for longest gives way."""

    def __init__(self, device: Device, limit: int = MAX_GRAPHS) -> None:
        self._device, self._limit = device, limit
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        # Runs that came once (True: record the next one) and those that cannot be recorded (False).
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do `work`, or launch its graph. `key` holds all that the recorded calls depend on.

        Raises what `work` raises when it is done; a recording that fails is not tried again.
        """
        if graph := self._graphs.get(key):
            self._graphs.move_to_end(key)
            graph.launch()
            return
        # Also where it is about to be recorded: TensorRT finishes what a change of shapes left to do in the
        # next run, and that must not become part of the graph.
        work()
        if self._seen.get(key):
            self._record(key, work)
        elif key not in self._seen:
            self._seen[key] = True
            if len(self._seen) > 8 * self._limit:
                self._seen.popitem(last=False)

    def close(self) -> None:
        """Destroy every graph, once the device has finished with them."""
        if self._graphs:
            self._device.synchronize()
        while self._graphs:
            self._graphs.popitem()[1].close()
        self._seen.clear()

    def __len__(self) -> int:
        return len(self._graphs)

    def _record(self, key: Hashable, work: Callable[[], None]) -> None:
        try:
            graph = self._device.capture(work)
        except EngineFailed:
            self._seen[key] = False
            return
        del self._seen[key]
        self._graphs[key] = graph
        if len(self._graphs) > self._limit:
            _, oldest = self._graphs.popitem(last=False)
            self._device.synchronize()
            oldest.close()
