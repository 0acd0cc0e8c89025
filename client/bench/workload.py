"""The requests of a run: serialized once, and made distinct one by one so that no cache can answer them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from .. import codec
from ..errors import BenchError
from ..wire import input_tensors
from .summary import BenchModel, Item


def choose_pool(items: Sequence[Item], size: int, seed: int = 0) -> list[Item]:
    """Items worth about `size` texts or passages, shuffled alike in every run, so that lengths stay mixed."""
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    pool, total = [], 0
    for item in shuffled:
        if total >= size:
            break
        pool.append(item)
        total += len(item.passages) or 1
    return pool


class Payloads:
    """Serialized ModelInferRequests over the pool, round and round, made distinct by blanks at their end.

    They end the last text of the request, which ends the serialized message (raw contents are its last
    field), so a request costs one concatenation. `fixed` gives one request again and again instead.
    """

    def __init__(self, model: BenchModel, triton_name: str, pool: Sequence[Item]) -> None:
        self._stems = [serialize(model, triton_name, item) for item in pool]
        # Distinct from the requests of an earlier run against the same server, too.
        self._counter = int(time.time() * 1000) % 2**31

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self._counter = (self._counter + 1) % 2**32
        return self._stems[self._counter % len(self._stems)] + codec.blanks(self._counter)

    def fixed(self) -> Iterator[bytes]:
        payload = next(self)
        while True:
            yield payload


def serialize(model: BenchModel, triton_name: str, item: Item) -> bytes:
    """The request for `item` up to where its blanks belong."""
    import tritonclient.grpc
    from tritonclient.grpc import service_pb2

    end = codec.blanks(0)
    request = codec.InferRequest(
        model=triton_name, inputs=_inputs(model, item, end), outputs=(), request_id=""
    )
    message = service_pb2.ModelInferRequest(model_name=triton_name)
    for tensor in input_tensors(tritonclient.grpc, request):
        message.inputs.append(tensor._get_tensor())
        message.raw_input_contents.append(tensor._get_content())
    payload: bytes = message.SerializeToString(deterministic=True)
    if not payload.endswith(end):
        raise BenchError("this protobuf library does not write a request's contents last")
    return payload[: -len(end)]


def _inputs(model: BenchModel, item: Item, end: bytes) -> dict[str, codec.Array]:
    if model.task != "rerank":
        return {"text": codec.text_column([item.text.encode() + end])}
    passages = [passage.encode() for passage in item.passages]
    passages[-1] += end
    return {"query": codec.text_row([item.text.encode()]), "passages": codec.text_row(passages)}


def units(model: BenchModel, pool: Sequence[Item]) -> float:
    """Units of work per request: 1 for a text, the mean number of passages for a query."""
    return sum(len(item.passages) for item in pool) / len(pool) if model.task == "rerank" else 1.0


def unit_name(model: BenchModel) -> str:
    return "passages" if model.task == "rerank" else "texts"
