"""ONNX Runtime's CPU session at the place of the one on the GPU: addresses of the fake device, its stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from triton_repo.runtime.session import onnx_session

Before = Callable[[int], None]


class FakeSession:
    """Runs a graph with the CPU's kernels at addresses of the fake device, when the stream gets there.

    Every binding must be complete and lie in the device's memory. `graphs` collects the CUDA graph ids that
    runs were started under. `before(graph)` is called as each run starts, and may raise.
    """

    def __init__(self, model: Any, device: Any, before: Before = lambda graph: None) -> None:
        self._session = onnx_session(model, 1)
        self._device = device
        self._api = device._checked.api
        self._before = before
        self.graphs: list[int] = []

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self, self._session.io_binding(), self._api)

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._before(graph)
        self.graphs.append(graph)
        for tensors in (self._session.get_inputs(), self._session.get_outputs()):
            assert {tensor.name for tensor in tensors} <= binding.bound.keys()
        for address, nbytes in binding.bound.values():
            self._api.check(address, nbytes)
        self._api.put(self._device.stream, lambda: self._session.run_with_iobinding(binding.real))


class FakeBinding:
    def __init__(self, session: FakeSession, real: Any, api: Any) -> None:
        self.session = session  # a real one keeps its session too
        self.real = real
        self.bound: dict[str, tuple[int, int]] = {}
        self._api = api

    def bind_input(self, *arguments: Any) -> None:
        self._bind(self.real.bind_input, *arguments)

    def bind_output(self, *arguments: Any) -> None:
        self._bind(self.real.bind_output, *arguments)

    def _bind(self, bind: Any, *arguments: Any) -> None:
        name, kind, index, dtype, shape, address = arguments
        assert (kind, index) == ("cuda", 0)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._api.check(address, nbytes)
        self.bound[name] = (address, nbytes)
        bind(name, "cpu", 0, dtype, shape, address)
