"""The golden requests of an engine, asked of a running server over the network: the way that clients come."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import ServerError
from triton_repo.control import Arrays, Busy, ControlsModels, Input
from triton_repo.runtime.golden import Differs, Golden, encoder_distance, generator_distance, unpacked
from triton_repo.runtime.probe import generator_request

# A server that has no room for one more request in all this time is not kept from its new version.
_PATIENCE_S = 15.0
_PAUSE_S = 0.1


def probe_served(control: ControlsModels, golden: Golden, name: str, version: int) -> int:
    """Ask one version every golden request; how many it answered, less than all only where it is overloaded.

    Raises ServerError that names the request and the difference, not the text; also where the version is not
    ready any more when the patience with a busy server ends.
    """
    deadline = time.monotonic() + _PATIENCE_S
    distances: list[float] = []
    where = "its golden requests"
    try:
        for index, recorded in enumerate(golden.requests):
            where = golden.where(index)
            distance = _distance(control, golden, recorded, (name, version), deadline)
            if distance is not None:
                distances.append(distance)
        where = "its golden requests"
        if distances:
            golden.judge(distances)
    except Differs as error:
        raise ServerError(f"{name} version {version}: {where}: {error}") from None
    if len(distances) < len(golden.requests):
        _require_ready(control, name, version)
    return len(distances)


def _require_ready(control: ControlsModels, name: str, version: int) -> None:
    state = control.states().get(name, {}).get(version)
    if state is None or state.phase != "READY":
        raise ServerError(f"{name} version {version} stopped being served while it was asked")


def _distance(
    control: ControlsModels,
    golden: Golden,
    recorded: Mapping[str, Any],
    served: tuple[str, int],
    deadline: float,
) -> float | None:
    """None where the server had no room for this request."""
    if golden.task != "generate":
        answer = _asked(control, served, _encoder_inputs(recorded), deadline, batched=True)
        if not answer:
            return None
        return encoder_distance(golden.task, unpacked(recorded["answer"]), _values(golden, answer))
    fields = {name: _encoded(value) for name, value in generator_request(recorded).items()}
    answer = _asked(control, served, {**fields, "stream": False}, deadline, batched=False)
    if not answer:
        return None
    return generator_distance(recorded, answer["token_ids"].tolist(), answer["logprobs"].tolist())


def _asked(
    control: ControlsModels,
    served: tuple[str, int],
    inputs: Mapping[str, Input],
    deadline: float,
    *,
    batched: bool,
) -> Arrays:
    """Nothing where the server took no request until the deadline. A response cache has kept such a
    rejection, and answers the same bytes with it, that is with nothing, from then on."""
    while True:
        try:
            return control.ask(*served, inputs, batched=batched)
        except Busy:
            if time.monotonic() > deadline:
                return {}
            time.sleep(_PAUSE_S)


def _encoder_inputs(recorded: Mapping[str, Any]) -> dict[str, Input]:
    if "text" in recorded:
        return {"text": recorded["text"].encode()}
    passages = [passage.encode() for passage in recorded["passages"]]
    return {"query": recorded["query"].encode(), "passages": passages}


def _encoded(value: Any) -> Input:
    return value.encode() if isinstance(value, str) else value


def _values(golden: Golden, answer: Arrays) -> npt.NDArray[Any]:
    """The answer in the order in which it was recorded: probabilities come best first."""
    if golden.task != "classify":
        return answer["embedding" if golden.task == "embed" else "scores"]
    scores = dict(zip(answer["labels"].reshape(-1).tolist(), answer["scores"].reshape(-1), strict=True))
    return np.array([scores.get(label.encode(), np.nan) for label in golden.labels])
