"""The form of a fuzz target for hypothesis: seeds with parts cut out, put in, doubled and changed."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from run import timed

_BATCH = 100


def inputs(module: ModuleType) -> st.SearchStrategy[bytes]:
    """Bytes for a target: mostly its seeds, changed up to six times by its words, or anything."""
    places = st.floats(0, 1, exclude_max=True)
    words = st.sampled_from(module.WORDS) | st.binary(max_size=4)
    changes = st.tuples(
        st.sampled_from(["insert", "replace", "cut", "double"]), places, st.integers(0, 64), words
    )
    changed = st.builds(_changed, st.sampled_from(module.SEEDS), st.lists(changes, max_size=6))
    return changed | changed | changed | st.binary(max_size=400)


def search(module: ModuleType, *, seconds: float, most: int = 10_000_000) -> int:
    """Run the target on the seeds, then for so long or so often; how often it ran. Raises what it raises."""
    ended, executions, last = time.monotonic() + seconds, 0, b""

    def run(data: bytes) -> None:
        nonlocal executions, last
        executions, last = executions + 1, data
        timed(module.target, data)

    examples = settings(
        max_examples=_BATCH,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(given(inputs(module))(run))
    try:
        for seed in module.SEEDS:
            run(seed)
        while time.monotonic() < ended and executions < most:
            examples()
    except Exception as error:
        # The last one that ran is the smallest that was found.
        error.add_note(f"the input: {last!r}")
        raise
    return executions


def _changed(seed: bytes, changes: list[tuple[str, float, int, Any]]) -> bytes:
    for kind, place, length, word in changes:
        start = int(place * (len(seed) + 1))
        part = seed[start : start + length]
        new = {"insert": word + part, "replace": word, "cut": b"", "double": part + part}[kind]
        seed = seed[:start] + new + seed[start + length :]
    return seed
