"""Processes that die: a model's, tritonserver, again and again; and one that stops answering."""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

from chaos_tools import ONCE, Work, figure, in_thread, model_process, serving
from small_llm import Talk

from build_engines.errors import ServerError
from client import Client, ConnectionLost, Unreachable
from triton_repo.server import Server, ServerOptions
from triton_repo.supervisor import Restart, RestartPolicy, Supervisor

# What a client may be told by a server that dies under it: to come again.
RETRYABLE = (ConnectionLost, Unreachable)


def test_a_killed_model_stops_the_server_with_its_name(talk_repository: Path, tmp_path: Path) -> None:
    with serving(talk_repository, tmp_path / "log") as served:
        talk = Talk(served.ready["urls"]["grpc"])
        with Work(served.ready["urls"]["grpc"], retry=ONCE) as work:
            thread, stream = in_thread(lambda: talk.whole(text="noodles", max_tokens=2000, ignore_eos=True))
            time.sleep(0.2)
            killed = time.monotonic()
            os.kill(model_process(served.ready["pid"], "vector"), signal.SIGKILL)
            code, said = served.ended()
            ended = time.monotonic() - killed
        thread.join()
    assert code == ServerError.exit_code
    assert "the process of model vector died (signal SIGKILL)" in said
    assert "--supervise" in said
    assert "Traceback" not in said
    # The other model's answer was still delivered.
    assert stream[0][1]["usage"]["completion_tokens"] == 2000
    assert work.wrong == 0
    assert all(failure.retryable for failure in work.failures), work.failures[:3]
    assert work.longest < 6
    figure(
        "kill -9 of a model's process",
        server_ended_s=ended,
        answered=work.answered,
        longest_wait_for_an_error_s=work.longest,
    )


def test_a_killed_model_is_back_under_supervision(talk_repository: Path, tmp_path: Path) -> None:
    with serving(talk_repository, tmp_path / "log", "--supervise") as served:
        urls = served.ready["urls"]
        with Work(urls["grpc"]) as work:
            killed = time.monotonic()
            os.kill(model_process(served.ready["pid"], "vector"), signal.SIGKILL)
            noticed, restart = served.wait_for("restart")
            back, ready = served.wait_for("ready", 2)
            time.sleep(1)
        assert ready["urls"] == urls
        assert Client(urls["grpc"]).embed("again", model="vector")
    assert "the process of model vector died (signal SIGKILL)" in restart["reason"]
    assert back - killed < 10
    assert (work.failures, work.wrong) == ([], 0)
    figure(
        "kill -9 of a model's process, --supervise",
        stopped_s=noticed - killed,
        back_s=back - killed,
        answered=work.answered,
        failed=len(work.failures),
        longest_wait_s=work.longest,
    )


def test_the_death_of_a_model_is_noticed_within_a_second(one_model: Path, tmp_path: Path) -> None:
    with Server(one_model, ServerOptions(free_ports=True, log=tmp_path / "log")) as server:
        assert server.fault() is None
        assert server.pid
        os.kill(model_process(server.pid, "vector"), signal.SIGSEGV)
        died = time.monotonic()
        while (fault := server.fault()) is None:
            time.sleep(0.1)
        noticed = time.monotonic() - died
    assert "the process of model vector died (signal SIGSEGV)" in fault.message
    assert noticed < 1
    figure("a model's process dies", noticed_s=noticed)


def test_a_killed_server_is_back_under_supervision(talk_repository: Path, tmp_path: Path) -> None:
    with serving(talk_repository, tmp_path / "log", "--supervise") as served:
        urls = served.ready["urls"]
        with Work(urls["grpc"]) as work, Work(f"http://{urls['http']}") as over_http:
            killed = time.monotonic()
            os.kill(served.ready["pid"], signal.SIGKILL)
            noticed, restart = served.wait_for("restart")
            back, ready = served.wait_for("ready", 2)
            time.sleep(1)
        assert ready["urls"] == urls
        assert ready["pid"] != served.ready["pid"]
    assert restart["reason"] == "tritonserver ended by itself (signal SIGKILL)"
    assert noticed - killed < 1
    assert back - killed < 10
    assert (work.failures + over_http.failures, work.wrong + over_http.wrong) == ([], 0)
    figure(
        "kill -9 of tritonserver, --supervise",
        noticed_s=noticed - killed,
        back_s=back - killed,
        answered=work.answered + over_http.answered,
        failed=0,
        longest_wait_s=max(work.longest, over_http.longest),
    )


def test_a_killed_server_tells_its_clients(talk_repository: Path, tmp_path: Path) -> None:
    with serving(talk_repository, tmp_path / "log") as served:
        url = served.ready["urls"]["grpc"]
        with Work(url, retry=ONCE) as work:
            client = Client(url, retry=ONCE)
            thread, stream = in_thread(
                lambda: list(
                    client.generate_stream("noodles", max_tokens=4000, ignore_eos=True, model="talk")
                )
            )
            time.sleep(0.3)
            killed = time.monotonic()
            os.kill(served.ready["pid"], signal.SIGKILL)
            code, said = served.ended()
        thread.join()
    assert code == ServerError.exit_code
    assert "tritonserver ended by itself (signal SIGKILL)" in said
    told, error = stream[0]
    assert isinstance(error, RETRYABLE), error
    assert told - killed < 2
    assert {type(failure) for failure in work.failures} <= set(RETRYABLE)
    figure(
        "kill -9 of tritonserver",
        stream_told_s=told - killed,
        with_error=type(error).__name__,
        longest_wait_s=work.longest,
    )


def test_a_crash_budget_ends_in_a_precise_error(one_model: Path, tmp_path: Path) -> None:
    with serving(one_model, tmp_path / "log", "--supervise") as served:
        started = time.monotonic()
        backs = []
        for crash in range(1, 6):
            _, ready = served.wait_for("ready", crash)
            killed = time.monotonic()
            os.kill(ready["pid"], signal.SIGKILL)
            if crash < 5:
                backs.append(served.wait_for("ready", crash + 1)[0] - killed)
        code, said = served.ended()
        took = time.monotonic() - started
    assert code == ServerError.exit_code
    assert "given up after 5 crashes within 600 s" in said
    assert "the last: tritonserver ended by itself (signal SIGKILL)" in said
    delays = [record["delay_s"] for _, record in served.records if record["event"] == "restart"]
    assert delays == [0, 0.5, 1, 2]
    assert max(backs) < 10
    assert sorted(path.name for path in tmp_path.glob("log*")) == [
        "log",
        *(f"log.{age}" for age in range(1, 5)),
    ]
    figure("5 crashes in a row", given_up_s=took, slowest_back_s=max(backs), logs_kept="5")


def test_a_port_lost_meanwhile_is_waited_for(one_model: Path, tmp_path: Path) -> None:
    with serving(one_model, tmp_path / "log", "--supervise") as served:
        port = int(served.ready["urls"]["http"].rpartition(":")[2])
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            os.kill(served.ready["pid"], signal.SIGKILL)
            deadline = time.monotonic() + 5
            while True:
                try:
                    thief.bind(("127.0.0.1", port))
                    break
                except OSError:
                    assert time.monotonic() < deadline
            thief.listen(1)
            _, second = served.wait_for("restart", 2)
        freed = time.monotonic()
        back, _ = served.wait_for("ready", 2)
    assert f"http port {port}: Address already in use" in second["reason"]
    figure("the port is taken while the server is down", back_after_it_is_free_s=back - freed)


def test_a_signal_in_the_middle_of_a_restart_stops_everything(one_model: Path, tmp_path: Path) -> None:
    with serving(one_model, tmp_path / "log", "--supervise") as served:
        os.kill(served.ready["pid"], signal.SIGKILL)
        served.wait_for("restart")
        served.process.send_signal(signal.SIGTERM)
        code, said = served.ended(10)
    assert code == 0
    assert "Traceback" not in said


def test_a_command_outlives_a_crash(one_model: Path, tmp_path: Path) -> None:
    program = """
        import os, signal, sys
        from client import Client
        from client.retry import RetryPolicy
        client = Client(os.environ["ONECARD_URL_GRPC"], retry=RetryPolicy(attempts=60, maximum=0.3))
        before = client.embed("noodles", model="vector").vector
        os.kill(int(os.environ["ONECARD_SERVER_PID"]), signal.SIGKILL)
        sys.exit(7 if (client.embed("noodles", model="vector").vector == before).all() else 1)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with serving(one_model, tmp_path / "log", "--supervise", "--", *command) as served:
        code, _ = served.ended()
    assert code == 7
    assert [record["event"] for _, record in served.records] == ["ready", "restart", "ready"]


def test_a_frozen_server_is_replaced(one_model: Path, tmp_path: Path) -> None:
    told: list[Restart] = []
    with Server(one_model, ServerOptions(free_ports=True, log=tmp_path / "log")) as server:
        keeper = Supervisor(server, told.append, RestartPolicy(silent_s=2))
        assert server.pid
        os.kill(server.pid, signal.SIGSTOP)
        frozen = time.monotonic()
        while (fault := keeper.fault()) is None:
            time.sleep(0.1)
        noticed = time.monotonic() - frozen
        keeper.recover(fault)
        back = time.monotonic() - frozen
        assert keeper.fault() is None
        assert server.answers()
    assert "has not answered for" in fault.message
    assert noticed < 6
    figure("tritonserver frozen (2 s allowed)", noticed_s=noticed, back_s=back)
