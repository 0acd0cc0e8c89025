"""The proxy configuration in the real nginx, before real servers: who comes in, what passes, what is logged.

Needs nginx and openssl (on Debian: apt-get install nginx openssl).
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc
from click.testing import CliRunner
from nginx_proxy import NGINX, OPENSSL, Proxy, write_authority
from small_llm import quiet
from small_models import LABELS, Served
from tritonclient.utils import InferenceServerException

from client import (
    AccessDenied,
    AsyncClient,
    Client,
    ClientError,
    InvalidInput,
    RetryPolicy,
    UnexpectedAnswer,
    Unreachable,
    Untrusted,
)
from client.cli import main
from triton_repo.running import ADMIN_HEADER

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        NGINX is None or OPENSSL is None, reason="needs nginx and openssl: apt-get install both"
    ),
]

TOKEN, OTHER = "5f" * 32, "0a" * 32
NAMES = {TOKEN: "shop", OTHER: "office"}
ONCE = RetryPolicy(attempts=1)
SCHEMES = ("grpcs", "https")
SECRET_TEXT = "good noodles with a secret"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def proxied(authority: Path, served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Before the server of encoders."""
    with Proxy(tmp_path_factory.mktemp("proxy") / "nginx", authority, NAMES, served.server.urls) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def talking_proxy(
    authority: Path, talking: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    with Proxy(tmp_path_factory.mktemp("proxy") / "nginx", authority, NAMES, talking.server.urls) as proxy:
        yield proxy


class Upstream:
    """What arrives behind the proxy, over HTTP and over gRPC; requests may be held up."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.release = threading.Event()
        self.release.set()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                upstream.headers.append({name.lower(): value for name, value in self.headers.items()})
                upstream.release.wait(20)
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 512
            daemon_threads = True

        class Calls(grpc.GenericRpcHandler):
            def service(self, details: Any) -> Any:
                upstream.headers.append(dict(details.invocation_metadata))
                return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")

        self._web = Server(("127.0.0.1", 0), Handler)
        self._grpc = grpc.server(ThreadPoolExecutor(2))
        self._grpc.add_generic_rpc_handlers((Calls(),))
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        self.urls = {"http": f"127.0.0.1:{self._web.server_port}", "grpc": f"127.0.0.1:{port}"}

    def __enter__(self) -> Upstream:
        threading.Thread(target=self._web.serve_forever, args=(0.05,), daemon=True).start()
        self._grpc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._web.shutdown()
        self._web.server_close()
        self._grpc.stop(None)


@pytest.fixture(scope="module")
def recorded(authority: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Upstream]]:
    """Before a server that only notes what arrives."""
    folder = tmp_path_factory.mktemp("proxy") / "nginx"
    with Upstream() as upstream, Proxy(folder, authority, NAMES, upstream.urls) as proxy:
        yield proxy, upstream


@pytest.fixture(params=["sync", "asyncio"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """One call by a client of its own; of a stream, all pieces."""

    def do(url: str, access: dict[str, Any], method: str, *arguments: Any, **options: Any) -> Any:
        if request.param == "sync":
            with Client(url, retry=ONCE, timeout=20, **access) as client:
                found = getattr(client, method)(*arguments, **options)
                return [*found] if method == "stream" else found

        async def go() -> Any:
            async with AsyncClient(url, retry=ONCE, timeout=20, **access) as client:
                found = getattr(client, method)(*arguments, **options)
                return [piece async for piece in found] if method == "stream" else await found

        return asyncio.run(go())

    return do


@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_a_token_every_call_passes(
    call: Any, scheme: str, proxied: Proxy, talking_proxy: Proxy, authority: Path
) -> None:
    url, access = f"{scheme}://127.0.0.1:{proxied.port}", {"token": OTHER, "ca": authority}
    assert call(url, access, "classify", "good noodles").label in LABELS
    assert len(call(url, access, "embed", ["good", "bad"] * 70, model="vector")) == 140
    assert len(call(url, access, "rerank", "noodles", ["good", "bad"])) == 2
    assert {model.name for model in call(url, access, "status").models} > {"label", "vector"}
    url = f"{scheme}://127.0.0.1:{talking_proxy.port}"
    pieces = call(url, access, "stream", "the noodles", model="talk", max_tokens=20, ignore_eos=True)
    assert sum(len(piece.token_ids) for piece in pieces) == 20
    assert call(url, access, "generate", "the noodles", model="talk", max_tokens=5).usage


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("token", [None, "cd" * 32, TOKEN[:-2], f"{TOKEN}5f"])
def test_without_a_valid_token_nothing_passes(
    call: Any, scheme: str, token: str | None, proxied: Proxy, authority: Path
) -> None:
    url, access = f"{scheme}://127.0.0.1:{proxied.port}", {"token": token, "ca": authority}
    for method, arguments in (("classify", ("good",)), ("status", ()), ("stream", ("good",))):
        with pytest.raises(AccessDenied) as caught:
            call(url, access, method, *arguments)
        assert "401" in str(caught.value)
        assert token is None or token not in str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_server_of_another_authority_is_not_talked_to(
    call: Any, scheme: str, proxied: Proxy, tmp_path: Path
) -> None:
    url = f"{scheme}://127.0.0.1:{proxied.port}"
    known = proxied.log.count("\n")
    for ca in (write_authority(tmp_path / "other"), None):  # None: the system's authorities
        for method in ("classify", "stream"):
            with pytest.raises(Untrusted, match="issuer certificate"):
                call(url, {"token": TOKEN, "ca": ca}, method, "good", model="label")
    assert proxied.log.count("\n") == known  # no request arrived, and with it no token


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_certificate_for_another_name_is_not_trusted(
    call: Any, scheme: str, proxied: Proxy, authority: Path
) -> None:
    with pytest.raises((Untrusted, Unreachable)):
        call(f"{scheme}://localhost:{proxied.port}", {"token": TOKEN, "ca": authority}, "classify", "good")


def test_plain_text_is_told_to_use_tls(call: Any, proxied: Proxy) -> None:
    for scheme in ("grpc", "http"):
        with pytest.raises(UnexpectedAnswer, match="TLS"):
            call(f"{scheme}://127.0.0.1:{proxied.port}", {}, "classify", "good")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pieces_pass_as_they_come_and_leaving_frees_the_slot(
    scheme: str, talking: Served, talking_proxy: Proxy, authority: Path
) -> None:
    url = f"{scheme}://127.0.0.1:{talking_proxy.port}"
    options: dict[str, Any] = {"model": "talk", "ignore_eos": True, "timeout": 20}
    with Client(url, retry=ONCE, token=TOKEN, ca=authority) as client:
        client.generate("a", max_tokens=1, **options)
        start = time.perf_counter()
        with client.stream("a", max_tokens=2000, **options) as stream:
            next(stream)
            first = time.perf_counter() - start
            pieces = sum(1 for _ in stream)
        assert pieces > 10
        assert first < (time.perf_counter() - start) / 2
        for _ in range(8):  # twice the slots: the second half would wait for ever
            with client.stream("a", max_tokens=6000, **options) as stream:
                next(stream)
    assert quiet(talking.server.urls["metrics"], "talk")["slots_active"] == 0


def answer(proxy: Proxy, authority: Path, target: str, *headers: str) -> int:
    """The status of a request whose target is sent as it is."""
    lines = [f"POST {target} HTTP/1.1", "Host: proxy", f"Authorization: Bearer {TOKEN}", *headers]
    lines += [f"{ADMIN_HEADER}: key", "Content-Length: 2", "Connection: close", "", "{}"]
    context = ssl.create_default_context(cafile=authority)
    plain = socket.create_connection(("127.0.0.1", proxy.port), 10)
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
        secure.sendall("\r\n".join(lines).encode())
        return int(secure.makefile("rb").readline().split()[1])


@pytest.mark.parametrize(
    "target",
    [
        "/v2/repository/index",
        "/v2/repository/models/vector/load",
        "/v2/repository/models/vector/unload",
        "/v2/systemsharedmemory/status",
        "/v2/cudasharedmemory/region/x/register",
        "/v2/trace/setting",
        "/v2/models/vector/trace/setting",
        "/v2/logging",
        "/metrics",
        "/",
        # These are other paths to nginx than to the server.
        "/v2/models/../repository/index",
        "/v2/models/%2e%2e/repository/index",
        "/v2/repository/models/..%2f..%2fmodels/load",
        "/v2/repository/../models/load",
        "/v2//repository/index",
        "/v2/models/vector/infer/../../../repository/index",
        "/v2/repository/index?/v2/models/vector/infer",
        "/v2/models/vector/infer?x=1",
        "/v2/models/vector/infer%0a",
        "http://127.0.0.1/v2/repository/index",
    ],
)
def test_what_changes_the_server_does_not_pass_over_http(
    target: str, recorded: tuple[Proxy, Upstream], authority: Path
) -> None:
    proxy, upstream = recorded
    arrived = len(upstream.headers)
    assert answer(proxy, authority, target) in (400, 403)
    assert len(upstream.headers) == arrived
    assert answer(proxy, authority, "/v2/models/vector/infer") == 200


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("get_model_repository_index", ()),
        ("load_model", ("vector",)),
        ("unload_model", ("vector",)),
        ("get_system_shared_memory_status", ()),
        ("register_system_shared_memory", ("a", "/a", 1)),
        ("get_cuda_shared_memory_status", ()),
        ("get_trace_settings", ()),
        ("get_log_settings", ()),
    ],
)
def test_nor_over_grpc(method: str, arguments: tuple[Any, ...], proxied: Proxy, authority: Path) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", ADMIN_HEADER: "key"}
    credentials = grpc.ssl_channel_credentials(authority.read_bytes())
    address = f"127.0.0.1:{proxied.port}"
    with tritonclient.grpc.InferenceServerClient(address, creds=credentials) as triton:
        with pytest.raises(InferenceServerException) as caught:
            getattr(triton, method)(*arguments, headers=headers)
        assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
        assert triton.is_model_ready("vector", headers=headers)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_large_request_is_refused_and_a_compressed_one(
    call: Any, scheme: str, proxied: Proxy, authority: Path
) -> None:
    url, access = f"{scheme}://127.0.0.1:{proxied.port}", {"token": TOKEN, "ca": authority}
    with pytest.raises(InvalidInput, match=r"413|larger than the proxy allows"):
        call(url, access, "embed", ["good " * 190_000] * 20, model="vector")
    assert answer(proxied, authority, "/v2/models/vector/infer", "Content-Encoding: gzip") == 415
    assert answer(proxied, authority, "/v2/models/vector/infer", "grpc-encoding: gzip") == 415


def test_the_log_has_ids_and_names_but_no_token_and_no_text(
    call: Any, proxied: Proxy, authority: Path
) -> None:
    for scheme in SCHEMES:
        url, access = f"{scheme}://127.0.0.1:{proxied.port}", {"token": TOKEN, "ca": authority}
        call(url, access, "classify", SECRET_TEXT, request_id=f"call-{scheme}", model="label")
        with pytest.raises(AccessDenied):
            call(url, {"token": "ee" * 32, "ca": authority}, "classify", SECRET_TEXT, model="label")
    lines = [json.loads(line) for line in proxied.log.splitlines() if line.startswith("{")]
    for scheme in SCHEMES:
        assert any(line["request_id"] == f"call-{scheme}" and line["caller"] == "shop" for line in lines)
    assert {line["caller"] for line in lines if line["status"] == 401} == {""}
    for secret in (TOKEN, OTHER, "ee" * 32, "secret", "noodles", "Bearer"):
        assert secret not in proxied.log


def test_the_command_line_goes_through_it(
    proxied: Proxy, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    url = f"https://127.0.0.1:{proxied.port}"
    words = ["query", "classify", "good", "--model", "label", "--url", url]
    given = CliRunner().invoke(main, [*words, "--ca", str(authority), "--token-file", str(file)])
    assert given.exit_code == 0, given.output
    monkeypatch.setenv("ONECARD_CA", str(authority))
    refused = CliRunner().invoke(main, words)
    assert (refused.exit_code, refused.stderr.count("\n")) == (40, 1)
    monkeypatch.setenv("ONECARD_TOKEN_FILE", str(file))
    assert CliRunner().invoke(main, words).exit_code == 0
    shown = CliRunner().invoke(main, ["status", "--url", url])
    assert "cannot be read" in shown.stdout  # the metrics stay with the server


def test_neither_token_nor_admin_key_nor_what_crashes_triton_reaches_the_server(
    recorded: tuple[Proxy, Upstream], authority: Path
) -> None:
    proxy, upstream = recorded
    infer = "/v2/models/m/infer"
    assert answer(proxy, authority, infer, "X-Request-Id: mine/1", "triton_grpc_error: 1") == 200
    credentials = grpc.ssl_channel_credentials(authority.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{proxy.port}", credentials) as channel:
        send = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        sent = {ADMIN_HEADER: "key", "x-request-id": "two words", "triton_grpc_error": "true"}
        send(b"", metadata=tuple({"authorization": f"Bearer {TOKEN}", **sent}.items()), timeout=10)
    over_http, over_grpc = upstream.headers[-2:]
    for headers in (over_http, over_grpc):
        assert not {"authorization", ADMIN_HEADER, "triton_grpc_error"} & set(headers)
    assert over_http["x-request-id"] == "mine/1"
    assert len(over_grpc["x-request-id"]) == 32  # what is no id is replaced
    assert "two words" not in proxy.log


def test_what_crashes_triton_is_taken_out_wherever_underscores_pass(authority: Path, tmp_path: Path) -> None:
    """Behind a setting of somebody's own, too: nginx's default is not what keeps the server up."""
    allowed = {"underscores_in_headers off;": "underscores_in_headers on;"}
    with (
        Upstream() as upstream,
        Proxy(tmp_path / "nginx", authority, NAMES, upstream.urls, allowed) as proxy,
    ):
        sent = ("triton_grpc_error: 1", "other_header: 1")
        assert answer(proxy, authority, "/v2/models/m/infer", *sent) == 200
        credentials = grpc.ssl_channel_credentials(authority.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{proxy.port}", credentials) as channel:
            metadata = {"authorization": f"Bearer {TOKEN}", "triton_grpc_error": "1", "other_header": "1"}
            send = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            send(b"", metadata=tuple(metadata.items()), timeout=10)
        for headers in upstream.headers:
            assert "triton_grpc_error" not in headers
            assert headers["other_header"] == "1"


def test_the_calls_that_may_crash_triton_can_be_left_out(
    call: Any, served: Served, authority: Path, tmp_path: Path
) -> None:
    """As docs/serving.md says, for callers that are not to be relied on."""
    less = {"|Statistics|Infer|StreamInfer)": "|Statistics|StreamInfer)"}
    access = {"token": TOKEN, "ca": authority}
    with Proxy(tmp_path / "nginx", authority, NAMES, served.server.urls, less) as proxy:
        with pytest.raises(AccessDenied):
            call(f"grpcs://127.0.0.1:{proxy.port}", access, "classify", "good", model="label")
        assert call(f"grpcs://127.0.0.1:{proxy.port}", access, "describe", "label").name == "label"
        assert call(f"https://127.0.0.1:{proxy.port}", access, "classify", "good").label in LABELS


def test_too_many_at_once_are_turned_away(authority: Path, tmp_path: Path) -> None:
    async def load(port: int, token: str) -> list[int]:
        import aiohttp

        async def one() -> int:
            async with session.post(f"https://127.0.0.1:{port}/v2/models/m/infer", json={}) as response:
                if response.status != 200:
                    upstream.release.set()
                return response.status

        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=authority), limit=0)
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            return await asyncio.gather(*(one() for _ in range(12)))

    fewer = {"limit_conn callers 256;": "limit_conn callers 8;"}
    with (
        Upstream() as upstream,
        Proxy(tmp_path / "nginx", authority, NAMES, upstream.urls, fewer) as proxy,
    ):
        upstream.release.clear()
        statuses = asyncio.run(load(proxy.port, TOKEN))
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 8
        assert 200 in asyncio.run(load(proxy.port, OTHER))  # each caller has its own share


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_server_that_is_away_is_said_so(call: Any, scheme: str, authority: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with Proxy(tmp_path / "nginx", authority, NAMES, {"http": address, "grpc": address}) as proxy:
            access = {"token": TOKEN, "ca": authority}
            for method in ("classify", "stream"):
                with pytest.raises(Unreachable, match="does not reach the server") as caught:
                    call(f"{scheme}://127.0.0.1:{proxy.port}", access, method, "good", model="m")
                assert isinstance(caught.value, ClientError)
                assert caught.value.retryable
