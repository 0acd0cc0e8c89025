"""The server's log: Triton's lines as JSON and back, and the logs of earlier starts."""

from __future__ import annotations

import datetime
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_engines.errors import ServerError
from triton_repo import json_log, server_log
from triton_repo.log_file import KEPT, LogFile
from triton_repo.runtime import events

DATA = Path(__file__).parent / "data"
NOW = datetime.datetime(2026, 11, 27, 2, 50, 30, tzinfo=datetime.UTC)
LINE = 'W1127 02:50:21.369312 32296 model.py:8] "a \\"quoted\\" word\\nand a line"'


def test_a_line_of_triton() -> None:
    assert json_log.record(LINE, NOW) == {
        "time": "2026-11-27T02:50:21.369312+00:00",
        "level": "warning",
        "source": "model.py:8",
        "message": 'a "quoted" word\nand a line',
    }


def test_a_line_of_a_model_file_carries_its_request() -> None:
    said = events.line(model="vector", event="rejected", reason="queue_full", request_id="r 1")
    found = json_log.record(f"I1127 02:50:21.369312 1 model.py:8] {json.dumps(said)}", NOW)
    assert (found["request_id"], found["model"]) == ("r_1", "vector")
    assert (found["event"], found["reason"]) == ("rejected", "queue_full")
    theirs = 'I1127 02:50:21.369312 1 http_server.cc:3652] "[request id: a\\tb] Infer failed"'
    assert json_log.record(theirs, NOW)["request_id"] == "a_b"
    unknown = theirs.replace("a\\tb", "<id_unknown>")
    assert "request_id" not in json_log.record(unknown, NOW)


def test_what_is_no_line_of_triton_is_kept_as_it_is() -> None:
    assert json_log.record("Signal (15) received.", NOW) == {
        "time": NOW.isoformat(),
        "level": "info",
        "source": "console",
        "message": "Signal (15) received.",
    }


@pytest.mark.parametrize(
    ("stamp", "now", "year"),
    [
        ("1231 23:59:59.9", datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC), 2026),
        ("0101 00:00:00.0", datetime.datetime(2026, 12, 31, 23, 59, tzinfo=datetime.UTC), 2027),
        ("0229 12:00:00.5", datetime.datetime(2028, 3, 1, tzinfo=datetime.UTC), 2028),
    ],
)
def test_the_year_that_triton_leaves_out(stamp: str, now: datetime.datetime, year: int) -> None:
    assert json_log.record(f'I{stamp} 1 a.cc:1] "x"', now)["time"].startswith(f"{year}-")


@given(st.lists(st.binary(max_size=80)))
def test_every_output_becomes_one_object_a_line(parts: list[bytes]) -> None:
    written = b"\n".join(parts)
    out = io.BytesIO()
    json_log.convert(io.BytesIO(written), out)
    lines = out.getvalue().split(b"\n")[:-1]
    assert len(lines) == len(written.split(b"\n")) - (not written or written.endswith(b"\n"))
    assert all({"time", "level", "source", "message"} <= json.loads(line).keys() for line in lines)


@given(st.text())
def test_a_message_survives(message: str) -> None:
    for quoted in (message, json.dumps(message), json.dumps(message, ensure_ascii=False)):
        line = f"E1127 02:50:21.369312 7 a.cc:1] {quoted}".replace("\n", " ")
        found = json_log.record(line, NOW)
        assert json_log.record(json_log.text(found), NOW)["message"] == found["message"]


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, _: object) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_does_not_stop_the_reading() -> None:
    source = io.BytesIO(b"x\n" * 100)
    json_log.convert(source, Full())
    assert source.read() == b""


def test_reasons_are_found_in_json_lines_too(tmp_path: Path) -> None:
    for name in ("failed_load.txt", "port_taken.txt"):
        out = io.BytesIO()
        json_log.convert(io.BytesIO((DATA / name).read_bytes()), out)
        (tmp_path / name).write_bytes(out.getvalue() + b'{"time": "half a li')
        plain, read = (DATA / name).read_text(), server_log.read(tmp_path / name)
        for ask in (server_log.loaded, server_log.failures, server_log.last_errors, server_log.port_taken):
            assert ask(read) == ask(plain)  # type: ignore[operator]


def test_the_last_logs_are_kept_and_no_more(tmp_path: Path) -> None:
    for number in range(KEPT + 3):
        log = LogFile(tmp_path / "log", "text")
        os.write(log.descriptor, f"start {number}".encode())
        log.opened()
        log.close()
    newest = KEPT + 2
    assert (tmp_path / "log").read_text() == f"start {newest}"
    kept = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "log"}
    assert kept == {f"log.{age}": f"start {newest - age}" for age in range(1, KEPT + 1)}


def test_json_lines_are_written_by_a_process_of_their_own(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log", "json")
    os.write(log.descriptor, LINE.encode() + b"\nSignal (15) received.\n")
    log.opened()
    log.close()
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (first["source"], second["source"]) == ("model.py:8", "console")
    assert log.text() == server_log.read(tmp_path / "log")
    assert "and a line" in log.text()


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match=r"the log .*/file/log cannot be written(?s:.*)--log"):
        LogFile(tmp_path / "file" / "log", "text")
