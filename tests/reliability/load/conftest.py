"""One real server with its load range for the session; durations come from `make soak`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import load_served as served
import pytest
from load_figures import outcomes
from load_generator import ANSWERED, generator
from load_plan import CAPACITY_S, Capacity, Range

from build_engines.errors import ServerError
from triton_repo.installation import find_installation


def seconds(name: str, default: int) -> float:
    return float(os.environ.get(name) or default)


@pytest.fixture(scope="session")
def overload_s() -> float:
    return seconds("ONECARD_OVERLOAD_SECONDS", 120)


@pytest.fixture(scope="session")
def soak_s() -> float:
    return seconds("ONECARD_SOAK_SECONDS", 1800)


@pytest.fixture(scope="session")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Range]:
    """The server with everything that can be sent to it, each answer once seen to be the expected one."""
    try:
        find_installation(tmp_path_factory.mktemp("installation"))
    except ServerError as error:
        pytest.skip(f"no tritonserver can run here: {error}")
    served.build()
    with generator() as (submit, pid), served.serving() as server:
        made = Range(server, submit, pid)
        made.load()
        wrong = outcomes(made.one_by_one().records)
        wrong.pop(ANSWERED)
        assert not wrong, wrong
        yield made


@pytest.fixture(scope="session")
def capacity(field: Range) -> Capacity:
    return field.capacity(CAPACITY_S)
