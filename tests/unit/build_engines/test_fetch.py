"""Fetch against a real HTTP hub on loopback: what huggingface_hub asks of it, and the ways it fails."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from build_engines import fetch, fetch_hub, untrusted
from build_engines.errors import BusyError, FetchError
from build_engines.fetch import fetch_model
from build_engines.stack import Model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = os.urandom(3 << 20)
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors": WEIGHTS,
    "1_Pooling/config.json": b"{}",
    "modules.json": b"[]",
    # None of these is ever needed.
    "README.md": b"hello",
    "onnx/model.onnx": b"x",
    "openvino/openvino_model.bin": b"x",
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"x",
    "flax_model.msgpack": b"x",
    "training_args.bin": b"pickle",
    ".gitattributes": b"",
}
NEEDED = {"config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json", "modules.json"}


@dataclass
class Hub:
    """What the hub holds and how it misbehaves; `requests` is what was asked of it."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    commit: str = COMMIT
    token: str | None = None
    api_error: tuple[int, str] | None = None
    cut_after: int | None = None
    ignore_range: bool = False
    altered: set[str] = field(default_factory=set)
    failures: list[int] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    listing: list[str] | None = None

    def asked_for(self, name: str) -> list[str | None]:
        return [ranges for path, ranges in self.requests if path.endswith(f"/{name}") and "/resolve/" in path]

    def siblings(self) -> list[dict[str, Any]]:
        names = self.listing or list(self.files)
        result = []
        for name in names:
            content = self.files.get(name, b"")
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            if len(content) > 1 << 20:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
            result.append(entry)
        return result


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.hub
        hub.requests.append((path, self.headers.get("Range")))
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"})
        elif path.startswith("/api/models/"):
            if hub.api_error:
                status, code = hub.api_error
                self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
            else:
                info = {"id": "owner/name", "sha": hub.commit, "siblings": hub.siblings()}
                self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif hub.failures:
            self._answer(hub.failures.pop(0), b"")
        else:
            self._file(path.split(f"/resolve/{hub.commit}/")[1])

    def _file(self, name: str) -> None:
        content, hub = self.hub.files[name], self.hub
        if name in hub.altered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, ranges = 0, self.headers.get("Range")
        if ranges and not hub.ignore_range:
            start = int(ranges.removeprefix("bytes=").rstrip("-"))
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if hub.cut_after is not None and len(body) > hub.cut_after:
            self.wfile.write(body[: hub.cut_after])
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(fetch_hub.time, "sleep", lambda _: None)
    yield state
    server.shutdown()
    server.server_close()


def _model(**changes: Any) -> Model:
    return Model(**{"name": "m", "task": "embed", "source": "owner/name"} | changes)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "sources" / "m"


def _published(dest: Path) -> set[str]:
    return {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}


def test_takes_what_is_needed_and_records_it(hub: Hub, dest: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    fetched = fetch_model(_model(), dest, progress=lambda *state: seen.append(state))
    assert _published(dest) == NEEDED | {fetch.RECORD}
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS
    assert fetched.commit == COMMIT
    assert fetched.origin == "hub"
    assert fetched.digests["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert seen[-1][1] == seen[-1][2] == sum(len(FILES[name]) for name in NEEDED)
    assert not hub.asked_for("pytorch_model.bin")
    leftovers = {path.name for path in dest.parent.iterdir() if path.is_dir()}
    assert leftovers == {"m"}


def test_second_fetch_needs_no_network(hub: Hub, dest: Path) -> None:
    fetch_model(_model(), dest)
    hub.requests.clear()
    assert fetch_model(_model(), dest).origin == "present"
    assert fetch_model(_model(), dest, offline=True).origin == "present"
    assert hub.requests == []


def test_another_revision_or_a_truncated_file_is_fetched_again(hub: Hub, dest: Path) -> None:
    fetch_model(_model(), dest)
    assert fetch_model(_model(revision="v2"), dest).origin == "hub"
    with (dest / "model.safetensors").open("r+b") as file:
        file.truncate(10)
    assert fetch_model(_model(revision="v2"), dest).origin == "hub"
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS


def test_goes_on_where_it_was_interrupted(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut_after = 1 << 20
    monkeypatch.setattr(fetch_hub, "_RETRIES", 0)
    with pytest.raises(FetchError, match="interrupted after") as caught:
        fetch_model(_model(), dest)
    assert "goes on from there" in str(caught.value)
    assert not dest.exists()
    part = dest.with_name(".m.partial") / "model.safetensors.part"
    have = part.stat().st_size
    assert 0 < have < len(WEIGHTS)
    hub.cut_after = None
    hub.requests.clear()
    fetch_model(_model(), dest)
    assert hub.asked_for("model.safetensors") == [f"bytes={have}-"]
    assert hub.asked_for("config.json") == []
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS


def test_a_breaking_connection_is_resumed_within_one_run(hub: Hub, dest: Path) -> None:
    hub.cut_after = 1 << 20
    fetch_model(_model(), dest)
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.asked_for("model.safetensors")) >= 3


def test_a_server_that_ignores_ranges_starts_over(hub: Hub, dest: Path) -> None:
    partial = dest.with_name(".m.partial")
    partial.mkdir(parents=True)
    (partial / ".commit").write_text(f"owner/name {COMMIT}")
    (partial / "model.safetensors.part").write_bytes(b"z" * 1000)
    hub.ignore_range = True
    seen: list[int] = []
    fetch_model(_model(), dest, progress=lambda _, done, __: seen.append(done))
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS
    assert seen[-1] == sum(len(FILES[name]) for name in NEEDED)


def test_a_partial_download_of_another_commit_is_not_used(hub: Hub, dest: Path) -> None:
    partial = dest.with_name(".m.partial")
    partial.mkdir(parents=True)
    (partial / ".commit").write_text("owner/name " + "f" * 40)
    (partial / "model.safetensors").write_bytes(b"old")
    (partial / "old.json").write_bytes(b"old")
    fetch_model(_model(), dest)
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS
    assert "old.json" not in _published(dest)


def test_busy_servers_are_asked_again(hub: Hub, dest: Path) -> None:
    hub.failures = [503, 429]
    assert fetch_model(_model(), dest).origin == "hub"


def test_altered_content_is_refused_and_removed(hub: Hub, dest: Path) -> None:
    hub.altered = {"model.safetensors"}
    with pytest.raises(FetchError, match="SHA-256"):
        fetch_model(_model(), dest)
    assert not dest.exists()
    hub.altered = set()
    fetch_model(_model(), dest)
    assert (dest / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "no such repository"),
        (401, "RepoNotFound", "HF_TOKEN"),
        (403, "GatedRepo", "agreement"),
        (404, "RevisionNotFound", "no revision 'v9'"),
        (500, "", "500"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: Hub, dest: Path, status: int, code: str, words: str) -> None:
    hub.api_error = (status, code)
    with pytest.raises(FetchError) as caught:
        fetch_model(_model(revision="v9"), dest)
    assert words in str(caught.value)
    assert caught.value.next_step
    assert not dest.exists()


def test_the_token_comes_from_the_environment(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(FetchError, match="HF_TOKEN"):
        fetch_model(_model(), dest)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch_model(_model(), dest).origin == "hub"


def test_an_unreachable_hub_says_so(dest: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match="cannot be reached"):
        fetch_model(_model(), dest)


def test_a_small_disk_is_noticed_before_anything_is_downloaded(
    hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(WEIGHTS)))
    with pytest.raises(FetchError, match="bytes free") as caught:
        fetch_model(_model(), dest)
    assert "make room for" in str(caught.value)
    assert not [path for path, _ in hub.requests if "/resolve/" in path]


def test_offline_without_the_checkpoint(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FetchError, match="offline mode"):
        fetch_model(_model(), dest, offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError, match="offline mode"):
        fetch_model(_model(), dest)
    assert hub.requests == []


def test_offline_takes_the_hubs_local_cache(hub: Hub, dest: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    for name, content in FILES.items():
        blob = repository / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    fetched = fetch_model(_model(), dest, offline=True)
    assert (fetched.origin, fetched.commit) == ("cache", COMMIT)
    assert _published(dest) == NEEDED | {fetch.RECORD}
    assert not any(path.is_symlink() for path in dest.rglob("*"))
    assert hub.requests == []


def test_pickled_weights_are_refused_unless_allowed(hub: Hub, dest: Path) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(FetchError, match=r"pickled \(pytorch_model.bin\)") as caught:
        fetch_model(_model(), dest)
    assert "allow_pickle = true under [models.m]" in str(caught.value)
    assert not [path for path, _ in hub.requests if "/resolve/" in path]


def test_an_allowed_pickle_becomes_safetensors(hub: Hub, dest: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": weight, "tied": weight}, tmp_path / "w.bin")
    del hub.files["model.safetensors"]
    hub.files["pytorch_model.bin"] = (tmp_path / "w.bin").read_bytes()
    fetched = fetch_model(_model(allow_pickle=True), dest)
    assert "model.safetensors" in fetched.digests
    assert not list(dest.glob("*.bin"))
    assert torch.equal(load_file(dest / "model.safetensors")["tied"], weight)
    assert fetch_model(_model(allow_pickle=True), dest).origin == "present"


def test_a_pickle_that_runs_code_is_not_run(hub: Hub, dest: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    del hub.files["model.safetensors"]
    hub.files["pytorch_model.bin"] = pickle.dumps({"a": Bomb()}, protocol=2)
    with pytest.raises(FetchError, match="cannot be read as weights"):
        fetch_model(_model(allow_pickle=True), dest)
    assert not (tmp_path / "ran").exists()
    assert not dest.exists()


def test_remote_code_is_refused_before_the_weights_are_downloaded(hub: Hub, dest: Path) -> None:
    hub.files["config.json"] = b'{"auto_map": {"AutoModel": "modeling_x.Model"}}'
    with pytest.raises(FetchError, match=r"auto_map: modeling_x\.Model"):
        fetch_model(_model(), dest)
    assert not hub.asked_for("model.safetensors")
    allowed = fetch_model(_model(allow_remote_code=True), dest)
    assert allowed.origin == "hub"
    with pytest.raises(FetchError, match="auto_map"):
        fetch_model(_model(), dest)


def test_python_files_are_refused_and_never_downloaded(hub: Hub, dest: Path) -> None:
    hub.files["modeling_x.py"] = b"raise SystemExit"
    with pytest.raises(FetchError, match=r"Python files \(modeling_x.py\)"):
        fetch_model(_model(), dest)
    fetch_model(_model(allow_remote_code=True), dest)
    assert not hub.asked_for("modeling_x.py")


@pytest.mark.parametrize("name", ["../evil.json", "/etc/passwd.json", "a/../../b.json", "a\\b.json"])
def test_names_that_leave_the_folder_are_refused(hub: Hub, dest: Path, name: str) -> None:
    hub.listing = [*hub.files, name]
    with pytest.raises(FetchError, match="leads out of"):
        fetch_model(_model(), dest)
    assert not [path for path, _ in hub.requests if "/resolve/" in path]


@pytest.mark.parametrize(("missing", "words"), [("config.json", "no config.json"), ("", "no weights")])
def test_incomplete_repositories_are_named(hub: Hub, dest: Path, missing: str, words: str) -> None:
    kept = {"config.json", "model.safetensors"} - {missing} if missing else {"config.json"}
    hub.files = {name: FILES[name] for name in kept}
    with pytest.raises(FetchError, match=words):
        fetch_model(_model(), dest)


def test_one_fetch_at_a_time(hub: Hub, dest: Path) -> None:
    with fetch._lock(dest), pytest.raises(BusyError):
        fetch_model(_model(), dest)


# Folders: checked where they are, by the same rules.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "mine"
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    return source


def _folder_model(folder: Path, **changes: Any) -> Model:
    return _model(source=str(folder), source_dir=folder, **changes)


def test_a_folder_is_used_where_it_is(folder: Path, dest: Path) -> None:
    fetched = fetch_model(_folder_model(folder), dest)
    assert (fetched.path, fetched.origin) == (folder, "folder")
    assert set(fetched.digests) == NEEDED
    assert not dest.exists()


def test_a_missing_folder(tmp_path: Path, dest: Path) -> None:
    with pytest.raises(FetchError, match="no such folder"):
        fetch_model(_folder_model(tmp_path / "nowhere"), dest)


def test_links_that_leave_the_folder_are_refused(folder: Path, dest: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "vocab.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(FetchError, match="link that leaves"):
        fetch_model(_folder_model(folder), dest)
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to("tokenizer.json")
    assert fetch_model(_folder_model(folder), dest).origin == "folder"


def test_pickles_and_code_in_a_folder(folder: Path, dest: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FetchError, match="pickled"):
        fetch_model(_folder_model(folder), dest)
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    fetched = fetch_model(_folder_model(folder, allow_pickle=True), dest)
    assert (fetched.path, fetched.origin) == (dest, "converted")
    assert (dest / "model.safetensors").is_file()
    assert (folder / "pytorch_model.bin").is_file()
    (folder / "handler.py").write_text("")
    with pytest.raises(FetchError, match=r"handler\.py"):
        fetch_model(_folder_model(folder, allow_pickle=True), dest)


def test_a_damaged_config_is_named(folder: Path, dest: Path) -> None:
    (folder / "config.json").write_bytes(b'{"model_type": ')
    with pytest.raises(FetchError, match=r"config\.json: not valid JSON"):
        fetch_model(_folder_model(folder), dest)


def test_a_place_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match=r"file.*Not a directory") as caught:
        fetch_model(_model(), tmp_path / "file" / "sources" / "model")
    assert "--build-dir" in str(caught.value)


def test_a_vocabulary_larger_than_any_is_not_downloaded(
    hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "MAX_VOCABULARY_BYTES", 10)
    with pytest.raises(FetchError, match=r"tokenizer\.json has 18 bytes, more than"):
        fetch_model(_model(), dest)
    assert not [path for path, _ in hub.requests if "/resolve/" in path]


def test_a_repository_of_more_files_than_any_is_not_downloaded(
    hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "MAX_FILES", 5)
    with pytest.raises(FetchError, match="more than 5 files"):
        fetch_model(_model(), dest)
    assert not [path for path, _ in hub.requests if "/resolve/" in path]


def test_a_tokenizer_of_the_hub_that_names_code(hub: Hub, dest: Path) -> None:
    named = {"auto_map": {"AutoTokenizer": ["other/repo--tokenizer.Evil", None]}}
    hub.files["tokenizer_config.json"] = json.dumps(named).encode()
    with pytest.raises(FetchError, match=r"tokenizer_config\.json names code of its own .*Evil"):
        fetch_model(_model(), dest)
    assert not dest.exists()
