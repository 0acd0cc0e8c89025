"""Replacing models of a running server: nothing is lost or mixed, and what answers wrongly is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from small_llm import POSITIONS, Talk, build_llm, write_llm
from small_models import build_engine, write_checkpoint
from tritonclient.grpc import InferenceServerClient, InferInput

from build_engines.golden import record_encoder, record_generator
from build_engines.manifest import write_manifest
from build_engines.stack import DataRef, Stack, load_stack
from client import Client
from triton_repo.cli import main
from triton_repo.control import Control, State
from triton_repo.deploy import Outcome, Rollout
from triton_repo.engine_entries import find_entries
from triton_repo.running import read_running
from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.generation import GenerationService
from triton_repo.server import Server, ServerOptions
from triton_repo.versions import ServedModel
from triton_repo.writer import write_repository

pytestmark = pytest.mark.serving

STACK = f"""
name = "rollout"
card = "rtx-5070-ti"

[models.vector]
task = "embed"
source = "./checkpoint-1/vector"
precisions = ["fp32"]
max_length = 64
cache = true

[models.talk]
task = "generate"
source = "./checkpoint-1/talk"
precisions = ["fp32"]
slots = 4
max_length = {POSITIONS}
prefill_chunk = 64
evaluation = "talks.jsonl"
calibration = {{ data = "talks.jsonl" }}
"""
TEXTS = ("the noodles were very good", "별로예요", "cold review", "never again, bad place")
PROMPT = "the noodles were good"
TOKENS = 24


class Site:
    """A stack with a running server; engines of several seeds take the place of what is built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        (folder / "stack.toml").write_text(STACK)
        talk = {"messages": [{"role": "user", "content": "0 " + "the noodles " * 20}]}
        (folder / "talks.jsonl").write_text(json.dumps(talk) + "\n")
        for seed in (1, 2):
            self.build(seed)
        self.put(1)
        write_repository(self.stack, folder / "engines", self.repository)
        self.server = Server(self.repository, ServerOptions(free_ports=True, log=folder / "log"))

    @property
    def stack(self) -> Stack:
        return load_stack(self.folder / "stack.toml", build_dir=self.folder)

    def build(self, seed: int) -> None:
        """Engines of other weights, with their golden requests, as `build-engines build` leaves them."""
        checkpoint = write_checkpoint(self.folder / f"checkpoint-{seed}" / "vector", "embed", seed=seed)
        folder = build_engine(checkpoint, self.aside("vector", seed), model="vector", task="embed")
        record_encoder(folder, TEXTS, ())
        self.seal(folder)
        checkpoint = write_llm(self.folder / f"checkpoint-{seed}" / "talk", seed=seed)
        folder = build_llm(checkpoint, self.aside("talk", seed), model="talk")
        record_generator(folder, DataRef(spec="talks.jsonl", path=self.folder / "talks.jsonl"))
        self.seal(folder)

    def aside(self, model: str, seed: int | str) -> Path:
        return self.folder / "aside" / f"{model}-{seed}"

    def seal(self, folder: Path) -> None:
        """The manifest anew, with all files that are there."""
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in ("format", "engine", "files", "digest"):
            del manifest[name]
        (folder / "manifest.json").unlink()
        write_manifest(folder, manifest, "engine.onnx")

    def put(self, seed: int | str, models: Sequence[str] = ("vector", "talk")) -> None:
        """Where a build puts its engines: what was there stays where it is linked."""
        for model in models:
            shutil.rmtree(self.built(model), ignore_errors=True)
            shutil.copytree(self.aside(model, seed), self.built(model))

    def built(self, model: str) -> Path:
        return self.folder / "engines" / model / "fp32" / "onnxruntime"

    def answers(self) -> tuple[list[np.ndarray[Any, Any]], str]:
        """What the engines that are built now answer, in this process."""
        encoder = Encoder.open(self.built("vector"))
        vectors = [np.asarray(value) for value in encoder.encode(encoder.tokenizer.singles(TEXTS))]
        service = GenerationService.open(self.built("talk"))
        text = service.generate({"text": PROMPT, "max_tokens": TOKENS, "ignore_eos": True})[0].text
        service.close()
        return vectors, text

    def rollout(self) -> Rollout:
        return Rollout(self.repository, Control(read_running(self.repository)), lambda text: None)

    def deploy(self) -> list[Outcome]:
        entries = find_entries(self.stack, self.folder / "engines", "onnxruntime")
        return list(self.rollout().deploy(self.stack, entries, lambda name: True))

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "triton_repo.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def ready_versions(self) -> dict[str, list[int]]:
        states = Control(read_running(self.repository)).states()
        return {
            name: [version for version, state in versions.items() if state.phase == "READY"]
            for name, versions in states.items()
        }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("rollout"))
    with site.server:
        yield site


class Load:
    """Requests without a pause from several threads: raw ones, the project's client's, and streams."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.grpc = site.server.urls["grpc"]
        self.vectors: list[tuple[str, int, np.ndarray[Any, Any]]] = []
        self.texts: list[str] = []
        self.unready = 0
        self.errors: list[str] = []
        self._http = site.server.urls["http"]
        self._stop = threading.Event()
        work = (self._raw(), self._raw(" "), self._client(), self._stream(), self._health)
        self._threads = [threading.Thread(target=self._repeat, args=(step,)) for step in work]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        time.sleep(0.3)
        return self

    def __exit__(self, *exception: object) -> None:
        time.sleep(0.3)
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _repeat(self, step: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                step()
            except Exception as error:  # each of them is one too many
                self.errors.append(repr(error))

    def _raw(self, blank: str = "") -> Callable[[], None]:
        """The same texts again and again, which the response cache knows, but not behind ever more blanks."""
        connection = InferenceServerClient(self.grpc)
        count = itertools.count()

        def ask() -> None:
            for place, text in enumerate(TEXTS):
                given = InferInput("text", [1, 1], "BYTES")
                sent = text + blank * next(count)
                given.set_data_from_numpy(np.array([[sent.encode()]], dtype=object))
                found = connection.infer("vector", [given], client_timeout=30)
                vector = found.as_numpy("embedding")[0]
                self.vectors.append((found.get_response().model_version, place, vector))

        return ask

    def _client(self) -> Callable[[], None]:
        client = Client(f"http://{self._http}")

        def ask() -> None:
            found = client.embed(list(TEXTS), model="vector", timeout=30)
            self.vectors += [("", place, answer.vector) for place, answer in enumerate(found)]

        return ask

    def _stream(self) -> Callable[[], None]:
        talk = Talk(self.grpc)
        return lambda: self.texts.append(talk.text(text=PROMPT, max_tokens=TOKENS, ignore_eos=True))

    def _health(self) -> None:
        """Neither a health check nor who watches the models' processes sees a fault."""
        time.sleep(0.01)
        assert self._site.server.fault() is None
        with urllib.request.urlopen(f"http://{self._http}/v2/health/ready", timeout=30) as answer:
            assert answer.status == 200


def test_a_rollout_and_a_rollback_under_load_lose_and_mix_nothing(site: Site) -> None:
    first, first_text = site.answers()
    site.put(2)
    second, second_text = site.answers()
    with Load(site) as load:
        outcomes = {found.name: found for found in site.deploy()}
        time.sleep(0.3)
        [back] = site.rollout().rollback("vector")
    assert (back.action, back.old, back.new) == ("roll back", 2, 1)
    assert load.errors == []
    for name in ("vector", "talk"):
        found = outcomes[name]
        assert (found.action, found.old, found.new) == ("replace", 1, 2)
        assert found.golden > 0
        assert found.probed == found.golden
        assert found.drain_s is not None
    assert first_text != second_text
    assert set(load.texts) == {first_text, second_text}
    told_apart: set[int] = set()
    for version, place, vector in load.vectors:
        versions = {
            number
            for number, expected in ((1, first), (2, second))
            if np.allclose(vector, expected[place], atol=1e-5)
        }
        assert len(versions) == 1
        assert version in {"", *map(str, versions)}
        told_apart |= versions
    assert told_apart == {1, 2}
    assert len(load.vectors) > 200
    assert site.ready_versions() == {"vector": [1], "talk": [2]}
    print(f"{len(load.vectors)} vectors, {len(load.texts)} streams")
    print(*(found.as_dict() for found in outcomes.values()), sep="\n")


def test_an_engine_that_answers_otherwise_than_recorded_is_refused_and_the_old_one_stays(site: Site) -> None:
    """Its digests are right: only what it answers tells."""
    before = site.ready_versions()
    bad = shutil.copytree(site.aside("vector", 2), site.aside("vector", "bad"))
    noisy(bad / "engine.onnx")
    site.seal(bad)
    site.put("bad", ["vector"])
    with Load(site) as load:
        done = site.command(
            "deploy", str(site.folder / "stack.toml"), "--build-dir", str(site.folder), "--model", "vector"
        )
    assert done.returncode == 20, done.stderr
    assert "vector: version 3 was not taken up: engine refused: " in done.stderr
    assert "its golden requests: on average" in done.stderr
    assert "version 1 serves on" in done.stderr
    assert "Traceback" not in done.stderr
    assert load.errors == []
    assert site.ready_versions() == before
    assert not (site.repository / "vector" / "3").exists()


def noisy(engine: Path) -> None:
    """One weight of the engine, with noise of a third of its own spread."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(engine))
    weight = next(
        tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) >= 32
    )
    values = numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(0, values.std() / 3, values.shape)
    weight.CopyFrom(numpy_helper.from_array((values + noise).astype(values.dtype), weight.name))
    engine.unlink()
    onnx.save(model, str(engine))


KILLED = """
import os, sys
from triton_repo import deploy
from triton_repo.cli import main
deploy.probe_served = lambda *given: os._exit(9)  # Triton has switched, the disk has not
main(sys.argv[1:])
"""


def test_a_killed_deploy_is_undone_and_a_restart_serves_what_was_deployed(site: Site) -> None:
    site.put(2)
    words = ["deploy", str(site.folder / "stack.toml"), "--build-dir", str(site.folder), "--model", "vector"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], timeout=120, check=False)
    assert killed.returncode == 9
    assert site.ready_versions()["vector"] == [3]
    assert "versions: 1\n" in (site.repository / "vector" / "config.pbtxt").read_text()
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    [found] = json.loads(done.stdout)["models"]
    assert (found["name"], found["action"], found["old"], found["new"]) == ("vector", "replace", 1, 4)
    assert site.ready_versions() == {"vector": [4], "talk": [2]}
    site.server.stop()
    site.server.start()
    assert site.ready_versions() == {"vector": [4], "talk": [2]}
    with Client(site.server.urls["grpc"]) as client:
        [answer] = client.embed([TEXTS[0]], model="vector")
    assert np.allclose(answer.vector, site.answers()[0][0], atol=1e-5)


SERVER_KILLED = """
import os, signal, sys
from triton_repo import deploy
from triton_repo.cli import main
real = deploy.probe_served
def probe_served(*given):
    os.kill(int(os.environ["SERVER"]), signal.SIGKILL)
    return real(*given)
deploy.probe_served = probe_served
main(sys.argv[1:])
"""


def test_a_server_that_dies_while_the_new_version_is_asked_starts_with_the_old_one(site: Site) -> None:
    before = site.ready_versions()
    site.put(1, ["vector"])
    words = ["deploy", str(site.folder / "stack.toml"), "--build-dir", str(site.folder), "--model", "vector"]
    done = subprocess.run(
        [sys.executable, "-c", SERVER_KILLED, *words],
        env={**os.environ, "SERVER": str(site.server.pid)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 20, done.stderr
    assert "is gone" in done.stderr
    assert "Traceback" not in done.stderr
    site.server.stop()
    site.server.start()
    assert site.ready_versions() == before
    [found] = site.deploy()[:1]
    assert (found.name, found.action) == ("vector", "replace")
    assert ServedModel(site.repository / "vector").kept == [found.old, found.new]


LOADING = """
import os, sys
from triton_repo.cli import main
from triton_repo.deploy import Rollout
Rollout._taken_up = lambda *given: os._exit(9)  # the new model is in the repository, and not loaded
main(sys.argv[1:])
"""
EXTRA = """
[models.extra]
task = "embed"
source = "./checkpoint-3/extra"
precisions = ["fp32"]
max_length = 64
"""


@pytest.fixture
def extra(site: Site) -> Iterator[list[str]]:
    """A model more in the stack file, and built, and the command that deploys it."""
    stack, engine = site.folder / "stack.toml", site.built("extra")
    before = stack.read_text()
    stack.write_text(before + EXTRA)
    checkpoint = write_checkpoint(site.folder / "checkpoint-3" / "extra", "embed", seed=3)
    build_engine(checkpoint, engine, model="extra", task="embed")
    record_encoder(engine, TEXTS, ())
    site.seal(engine)
    yield ["deploy", str(stack), "--build-dir", str(site.folder)]
    stack.write_text(before)
    shutil.rmtree(site.folder / "engines" / "extra")
    shutil.rmtree(site.folder / "checkpoint-3")
    site.deploy()


def test_a_deploy_that_is_killed_while_it_adds_a_model_blocks_nothing(site: Site, extra: list[str]) -> None:
    before, folder = site.ready_versions(), site.repository / "extra"
    killed = subprocess.run([sys.executable, "-c", LOADING, *extra], timeout=120, check=False)
    assert killed.returncode == 9
    assert folder.is_dir()
    site.server.stop()
    site.server.start()
    assert {name: ready for name, ready in site.ready_versions().items() if ready} == before
    # The next command is about another model.
    done = site.command(*extra, "--model", "vector")
    assert done.returncode == 0, done.stderr
    assert not folder.exists()
    killed = subprocess.run([sys.executable, "-c", KILLED, *extra], timeout=120, check=False)
    assert killed.returncode == 9
    assert site.ready_versions()["extra"] == [1]
    done = site.command(*extra, "--model", "vector")
    assert done.returncode == 0, done.stderr
    assert not folder.exists()
    assert site.ready_versions() == before
    done = site.command(*extra)
    assert done.returncode == 0, done.stderr
    assert len(site.ready_versions()["extra"]) == 1
    assert (folder / "config.pbtxt").is_file()


def test_a_deploy_that_is_told_to_stop_while_it_adds_a_model_takes_it_back(
    site: Site, extra: list[str]
) -> None:
    before = site.ready_versions()
    command = subprocess.Popen(
        [sys.executable, "-m", "triton_repo.cli", *extra], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while Control(read_running(site.repository)).states().get("extra", {}).get(1) != State("LOADING"):
        assert time.monotonic() < deadline
        assert command.poll() is None
        time.sleep(0.01)
    command.send_signal(signal.SIGTERM)
    _, said = command.communicate(timeout=60)
    assert command.returncode == 130, said
    assert "Traceback" not in said
    assert not (site.repository / "extra").exists()
    assert not list(site.folder.glob(".repository.aside-*"))
    assert site.ready_versions() == before
    assert site.server.fault() is None


def test_a_cached_model_that_comes_back_is_not_answered_for_by_the_one_before(
    site: Site, extra: list[str]
) -> None:
    """Triton's response cache outlives a model that is unloaded."""
    stack = site.folder / "stack.toml"
    without, cached = stack.read_text().removesuffix(EXTRA), stack.read_text() + "cache = true\n"

    def vectors() -> list[np.ndarray[Any, Any]]:
        with Client(f"http://{site.server.urls['http']}") as client:
            return [client.embed([text], model="extra")[0].vector for text in TEXTS]

    stack.write_text(cached)
    site.deploy()
    old = vectors()
    assert np.array_equal(vectors(), old)
    stack.write_text(without)
    assert ("extra", "remove") in [(found.name, found.action) for found in site.deploy()]
    assert "extra" not in Control(read_running(site.repository)).states()
    shutil.rmtree(site.built("extra"))
    checkpoint = write_checkpoint(site.folder / "checkpoint-4" / "extra", "embed", seed=4)
    build_engine(checkpoint, site.built("extra"), model="extra", task="embed")
    record_encoder(site.built("extra"), TEXTS, ())
    site.seal(site.built("extra"))
    stack.write_text(cached)
    site.deploy()
    encoder = Encoder.open(site.built("extra"))
    expected = encoder.encode(encoder.tokenizer.singles(TEXTS))
    assert np.allclose(vectors(), expected, atol=1e-5)
    assert not np.allclose(old, expected, atol=1e-2)
