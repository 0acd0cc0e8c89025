"""What the log says of a request: readable again, on one line, and without anything of its text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_repo.runtime import events

WORDS = st.from_regex(r"[a-z][a-z_]{0,20}", fullmatch=True)


def test_a_line_as_it_is_documented() -> None:
    made = events.line(model="sentiment", event="rejected", reason="queue_full", request_id="r-17")
    assert made == "onecard request_id=r-17 model=sentiment event=rejected reason=queue_full"
    assert events.parse(made) == {
        "request_id": "r-17",
        "model": "sentiment",
        "event": "rejected",
        "reason": "queue_full",
    }
    assert "request_id" not in events.line(model="m", event="failed", reason="EngineFailed")


@given(st.text(), WORDS, WORDS)
def test_every_id_gives_one_printable_line_that_is_read_again(
    request_id: str, event: str, reason: str
) -> None:
    made = events.line(model="vector-int8", event=event, reason=reason, request_id=request_id)
    assert made.isprintable()
    made.encode()
    found = events.parse(made)
    assert found is not None
    kept = found.pop("request_id", "")
    assert len(kept) == min(len(request_id), 64)
    assert all(new in (old, "_") for new, old in zip(kept, request_id, strict=False))
    assert found == {"model": "vector-int8", "event": event, "reason": reason}


@given(st.text())
def test_a_text_in_the_place_of_a_reason_is_not_written(text: str) -> None:
    secret = f"the noodles {text}"
    made = events.line(model="m", event=secret, reason=secret)
    assert made == "onecard model=m event=other reason=other"


@pytest.mark.parametrize(
    "message",
    ["", "onecard", "onecard ", "onecards model=m", " onecard model=m", "onecard model=", "onecard x=1", "x"],
)
def test_other_messages_are_not_ours(message: str) -> None:
    assert events.parse(message) is None


@given(st.text())
def test_no_message_breaks_the_parser(message: str) -> None:
    events.parse(message)
    events.parse(f"onecard {message}")
