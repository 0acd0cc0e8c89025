"""Rollouts over a server that does what Triton 2.51 was seen to do: what is on disk, also after a failure of
any step. tests/serving/test_serving_deploy.py has the real one."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from repo_fakes import reseal

from build_engines.digests import verify_digests
from build_engines.errors import BusyError, PlanError, RepositoryError, ServerError
from build_engines.stack import Stack, load_stack
from triton_repo import processes, writer
from triton_repo.cli import main
from triton_repo.cli_deploy import _stopped_in_order
from triton_repo.config_pbtxt import parse
from triton_repo.control import Arrays, Busy, Input, State
from triton_repo.deploy import Outcome, Rollout
from triton_repo.engine_entries import find_entries
from triton_repo.installation import Installation
from triton_repo.repository import served_models
from triton_repo.running import Running, write_running
from triton_repo.runtime.golden import packed
from triton_repo.runtime.seal import check_served
from triton_repo.runtime.session import check_files, read_manifest
from triton_repo.server import Server as RealServer
from triton_repo.versions import ServedModel, served_versions, version_of
from triton_repo.writer import seal, write_repository

STACK = """
name = "small"
card = "rtx-5070-ti"

[models.sentiment]
task = "classify"
source = "./sentiment"
precisions = ["int8", "fp16"]
max_batch = 4
max_length = 16

[models.words]
task = "embed"
source = "./words"
precisions = ["fp16"]
max_batch = 4
max_length = 16
"""


class Server:
    """Model control as Triton does it, which forgets a model whose folder is gone. `refused`: versions that
    do not load; `answers`: what one says, by version; `busy`: it takes no request; `gone_when_asked`: it dies
    of one; `endless`: what it has begun never ends."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.versions: dict[str, dict[int, State]] = {}
        for model in served_versions(repository):
            self.versions[model.name] = {model.version: State("READY")}
        self.refused: set[tuple[str, int]] = set()
        self.answers: dict[int, Arrays] = {}
        self.busy = False
        self.gone_when_asked = False
        self.endless = False
        self.loads: list[tuple[str, int]] = []

    def states(self) -> dict[str, dict[int, State]]:
        there = {path.name for path in self.repository.iterdir()}
        self.versions = {name: versions for name, versions in self.versions.items() if name in there}
        found = {name: dict(versions) for name, versions in self.versions.items()}
        if not self.endless:
            for versions in self.versions.values():
                for version, state in versions.items():
                    if state.phase == "UNLOADING":
                        versions[version] = State("UNAVAILABLE", "unloaded")
        return found

    def load(self, config: Any, timeout_s: float) -> None:
        name, version = config.name, version_of(config)
        versions = self.versions.setdefault(name, {})
        if versions.get(version, State("UNAVAILABLE")).phase == "READY":
            return
        self.loads.append((name, version))
        folder = self.repository / name / str(version)
        check_files(folder, read_manifest(folder))
        if (name, version) in self.refused:
            versions[version] = State("UNAVAILABLE", "engine refused: golden request 1 of 1")
            raise ServerError("engine refused: golden request 1 of 1")
        for other, state in versions.items():
            if state.phase == "READY":
                versions[other] = State("UNLOADING")
        versions[version] = State("READY")

    def unload(self, name: str) -> None:
        """Of one that it does not know, or never loaded, it says nothing."""
        for version, state in self.versions.get(name, {}).items():
            if state.phase == "READY":
                self.versions[name][version] = State("UNLOADING")

    def ask(self, name: str, version: int, inputs: Mapping[str, Input], *, batched: bool) -> Arrays:
        if self.gone_when_asked:  # and supervised: it is back with what the disk says
            self.versions[name] = {version_of(ServedModel(self.repository / name).config): State("READY")}
        if self.busy:
            raise Busy("the queue is full")
        assert self.versions[name][version].phase == "READY"
        return self.answers[version]

    def serving(self) -> dict[str, list[int]]:
        found = {
            name: [version for version, state in versions.items() if state.phase == "READY"]
            for name, versions in self.versions.items()
        }
        return {name: versions for name, versions in found.items() if versions}


class Place:
    """A stack whose engines are built, and the repository of them."""

    def __init__(self, folder: Path, engine_folder: Callable[..., Path]) -> None:
        self.folder, self.engine_folder = folder, engine_folder
        self.repository = folder / "repository"
        (folder / "stack.toml").write_text(STACK)
        for model, precision, task in (
            ("sentiment", "int8", "classify"),
            ("sentiment", "fp16", "classify"),
            ("words", "fp16", "embed"),
        ):
            engine_folder(folder / "engines", model, precision, task)
        write_repository(self.stack, folder / "engines", self.repository)
        self.server = Server(self.repository)

    def copied(self, folder: Path) -> Place:
        """The same in a folder beside this one, by hard links."""
        names = ("stack.toml", "stack.json", "engines", "repository")
        folder.mkdir()
        for name in names:
            path = self.folder / name
            if path.is_dir():
                shutil.copytree(path, folder / name, copy_function=os.link)
            else:
                shutil.copyfile(path, folder / name)
        place = copy.copy(self)
        place.folder, place.repository = folder, folder / "repository"
        place.server = Server(place.repository)
        return place

    @property
    def stack(self) -> Stack:
        return load_stack(self.folder / "stack.toml", build_dir=self.folder)

    def built(self, model: str, precision: str) -> Path:
        return self.folder / "engines" / model / precision / "onnxruntime"

    def rebuild(self, model: str, precision: str, content: bytes, **changes: Any) -> None:
        """Another engine in the place of one, as the build leaves it: what is linked elsewhere stays."""
        folder = self.built(model, precision)
        (folder / "engine.onnx").unlink()
        (folder / "engine.onnx").write_bytes(content)
        manifest = folder / "manifest.json"
        text = manifest.read_text()
        manifest.unlink()
        manifest.write_text(text)
        reseal(folder, engine="engine.onnx", **changes)

    def rollout(self, server: Server | None = None) -> Rollout:
        return Rollout(self.repository, server or self.server, lambda text: None, ready_timeout_s=5)

    def deploy(self, server: Server | None = None) -> list[Outcome]:
        entries = find_entries(self.stack, self.folder / "engines", "onnxruntime")
        return list(self.rollout(server).deploy(self.stack, entries, lambda name: True))

    def add_variant(self) -> None:
        """`words-int8`, in the stack file and built."""
        text = (self.folder / "stack.toml").read_text()
        text = text.replace('precisions = ["fp16"]', 'precisions = ["fp16", "int8"]')
        (self.folder / "stack.toml").write_text(text)
        self.engine_folder(self.folder / "engines", "words", "int8", "embed")

    def variants(self) -> dict[str, dict[str, str]]:
        """What stack.json says."""
        models = json.loads((self.folder / "stack.json").read_text())["models"]
        return {name: model["variants"] for name, model in models.items()}

    def on_disk(self) -> dict[str, tuple[int, list[int]]]:
        return {model.name: (model.version, model.kept) for model in served_versions(self.repository)}

    def served(self, name: str) -> bytes:
        model = ServedModel(self.repository / name)
        return (model.path(model.version) / "engine.onnx").read_bytes()


@pytest.fixture
def place(tmp_path: Path, engine_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr("triton_repo.deploy._POLL_S", 0.001)
    return Place(tmp_path, engine_folder)


def actions(outcomes: list[Outcome]) -> dict[str, tuple[str, int | None, int | None]]:
    return {found.name: (found.action, found.old, found.new) for found in outcomes}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.aside-*") if path.is_dir() or path.parent != folder]


def test_what_has_not_changed_stays(place: Place) -> None:
    assert {action for action, _, _ in actions(place.deploy()).values()} == {"keep"}
    assert place.server.loads == []
    assert place.on_disk() == {"sentiment": (1, [1]), "sentiment-fp16": (1, [1]), "words": (1, [1])}


def test_the_changed_model_is_replaced_and_the_last_two_versions_are_kept(place: Place) -> None:
    for number in (2, 3, 4):
        place.rebuild("sentiment", "int8", b"engine %d" % number)
        found = actions(place.deploy())
        assert found["sentiment"] == ("replace", number - 1, number)
        assert found["words"] == ("keep", 1, 1)
        assert place.on_disk()["sentiment"] == (number, sorted({number - 1, number}))
        assert place.served("sentiment") == b"engine %d" % number
        assert place.server.serving() == {"sentiment": [number], "sentiment-fp16": [1], "words": [1]}
    assert leftovers(place.folder) == []
    config = place.repository / "sentiment" / "config.pbtxt"
    assert config.read_text() == (place.repository / "sentiment" / "4" / "config.pbtxt").read_text()


def test_new_settings_and_new_code_are_deployed_too(place: Place) -> None:
    path = place.folder / "stack.toml"
    path.write_text(STACK.replace('task = "embed"', 'task = "embed"\ncache = true'))
    assert actions(place.deploy())["words"] == ("replace", 1, 2)
    assert ServedModel(place.repository / "words").config.response_cache.enable
    model = place.repository / "words" / "2" / "model.py"
    model.write_text(model.read_text() + "\n")
    assert actions(place.deploy())["words"] == ("replace", 2, 3)


def test_variants_that_appear_are_added_and_those_that_vanish_go_last(place: Place) -> None:
    path = place.folder / "stack.toml"
    path.write_text(STACK.replace('["int8", "fp16"]', '["fp16", "int8"]'))
    outcomes = place.deploy()
    assert actions(outcomes) == {
        "sentiment": ("replace", 1, 2),
        "sentiment-int8": ("add", None, 1),
        "words": ("keep", 1, 1),
        "sentiment-fp16": ("remove", 1, None),
    }
    assert outcomes[-1].name == "sentiment-fp16"
    assert place.served("sentiment") == place.built("sentiment", "fp16").joinpath("engine.onnx").read_bytes()
    assert place.server.serving() == {"sentiment": [2], "sentiment-int8": [1], "words": [1]}
    assert {path.name for path in place.repository.iterdir()} == {"sentiment", "sentiment-int8", "words"}
    models = json.loads((place.folder / "stack.json").read_text())["models"]
    assert models["sentiment"]["variants"] == {"fp16": "sentiment", "int8": "sentiment-int8"}
    assert models["words"]["variants"] == {"fp16": "words"}


def test_a_version_that_does_not_load_changes_nothing(place: Place) -> None:
    before = place.served("sentiment")
    place.rebuild("sentiment", "int8", b"bad")
    place.server.refused.add(("sentiment", 2))
    with pytest.raises(ServerError, match="version 2 was not taken up: engine refused: golden") as refused:
        place.deploy()
    assert "version 1 serves on" in str(refused.value)
    assert place.on_disk()["sentiment"] == (1, [1])
    assert place.served("sentiment") == before
    assert place.server.serving()["sentiment"] == [1]
    assert leftovers(place.folder) == []
    # The number has never answered, so that it is free; Triton then forgets the failure.
    place.server.refused.clear()
    assert actions(place.deploy())["sentiment"] == ("replace", 1, 2)


def test_a_new_variant_that_does_not_load_is_gone(place: Place) -> None:
    place.add_variant()
    place.server.refused.add(("words-int8", 1))
    with pytest.raises(ServerError, match="words-int8: version 1 was not taken up"):
        place.deploy()
    assert not (place.repository / "words-int8").exists()
    assert place.variants()["words"] == {"fp16": "words"}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("command", ["deploy", "rollback"])
def test_a_new_model_whose_deploy_is_killed_as_it_loads_blocks_nothing(
    place: Place, command: str, loaded: bool
) -> None:
    """Neither a restart nor the next command, where it does not load or was loaded just then."""
    place.rebuild("sentiment", "int8", b"second")
    place.deploy()
    place.add_variant()

    def killed() -> int:
        place.server.load = lambda *given: os._exit(9)  # type: ignore[method-assign]
        place.deploy()
        return 0

    assert in_child(killed) == 9
    assert (place.repository / "words-int8" / "1").is_dir()
    assert loaded_by_a_restart(place) == {"sentiment", "sentiment-fp16", "words"}
    place.server.refused.add(("words-int8", 1))
    if loaded:
        place.server.versions["words-int8"] = {1: State("READY")}
    (place.folder / "stack.toml").write_text(STACK)
    if command == "deploy":
        place.rebuild("sentiment", "int8", b"third")
        assert actions(place.deploy())["sentiment"] == ("replace", 2, 3)
    else:
        assert actions(list(place.rollout().rollback(None))) == {"sentiment": ("roll back", 2, 1)}
    assert place.server.serving().keys() == {"sentiment", "sentiment-fp16", "words"}
    assert not (place.repository / "words-int8").exists()
    assert leftovers(place.folder) == []


def loaded_by_a_restart(place: Place) -> set[str]:
    installation = Installation(Path("tritonserver"), None, None, (), "PATH")
    words = RealServer(place.repository)._command(installation)
    return {word.removeprefix("--load-model=") for word in words if word.startswith("--load-model=")}


def test_a_model_is_served_by_a_restart_once_it_was_taken_up(place: Place) -> None:
    place.add_variant()
    load, found = place.server.load, []

    def loading(config: Any, timeout_s: float) -> None:
        found.append(config.name in served_models(place.repository))
        load(config, timeout_s)

    place.server.load = loading  # type: ignore[method-assign]
    assert actions(place.deploy())["words-int8"] == ("add", None, 1)
    assert found == [False]
    assert "words-int8" in loaded_by_a_restart(place)


def test_a_new_model_that_is_interrupted_as_it_loads_goes_when_it_has_loaded(place: Place) -> None:
    """Triton goes on loading: the folder stays until it is done with it."""
    place.add_variant()
    folder, states = place.repository / "words-int8", place.server.states

    def interrupted(config: Any, timeout_s: float) -> None:
        place.server.versions[config.name] = {1: State("LOADING")}
        raise KeyboardInterrupt

    def loads() -> dict[str, dict[int, State]]:
        found = states()
        if found.get("words-int8") == {1: State("LOADING")}:
            assert folder.is_dir()
            place.server.versions["words-int8"] = {1: State("READY")}
        return found

    place.server.load = interrupted  # type: ignore[method-assign]
    place.server.states = loads  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        place.deploy()
    assert not folder.exists()
    assert "words-int8" not in place.server.serving()


@pytest.fixture
def usual(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal as a shell's commands have it, whatever runs the tests."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


@pytest.mark.parametrize("usual", [signal.SIGTERM, signal.SIGHUP], indirect=True)
def test_a_signal_to_stop_is_an_interrupt_and_a_second_one_nothing(usual: signal.Signals) -> None:
    def taken_back() -> None:
        try:
            os.kill(os.getpid(), usual)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), usual)

    with pytest.raises(KeyboardInterrupt), _stopped_in_order():
        taken_back()
    assert signal.getsignal(usual) is signal.SIG_DFL


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """Under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stopped_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_watches_the_processes_leaves_triton_time_for_one_that_is_not_served_yet(place: Place) -> None:
    served, later = place.repository / "words" / "1", place.repository / "words" / "2"
    assert processes._patience(served) == processes._CRASHED_AFTER_S
    assert processes._patience(later) == processes._NOT_LOADED_AFTER_S
    (place.repository / "words" / "config.pbtxt").unlink()  # as of a model that is being added
    assert processes._patience(served) == processes._NOT_LOADED_AFTER_S


def with_evaluation(place: Place) -> Path:
    """Data that `sentiment` is measured with, and is served with."""
    data = place.folder / "reviews.jsonl"
    data.write_text(json.dumps({"text": "good", "label": "positive"}) + "\n")
    path = place.folder / "stack.toml"
    path.write_text(STACK.replace('task = "classify"', 'task = "classify"\nevaluation = "reviews.jsonl"'))
    write_repository(place.stack, place.folder / "engines", place.repository)
    assert verify_digests(place.folder).problems == []
    return data


@pytest.mark.parametrize("refused", [False, True])
def test_new_evaluation_data_is_recorded_whatever_becomes_of_the_models(place: Place, refused: bool) -> None:
    data = with_evaluation(place)
    data.write_text(json.dumps({"text": "bad", "label": "negative"}) + "\n")
    if refused:
        place.rebuild("sentiment", "int8", b"bad")
        place.server.refused.add(("sentiment", 2))
    with pytest.raises(ServerError) if refused else contextlib.nullcontext():
        place.deploy()
    assert "bad" in (place.folder / "evaluation" / "sentiment.jsonl").read_text()
    assert verify_digests(place.folder).problems == []


def test_what_was_switched_before_an_interrupt_is_in_stack_json(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the old version answers what it has begun."""

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Rollout, "_drained", interrupted)
    path = place.folder / "stack.toml"
    path.write_text(STACK.replace('["int8", "fp16"]', '["fp16", "int8"]'))
    with pytest.raises(KeyboardInterrupt):
        place.deploy()
    assert place.server.serving()["sentiment"] == [2]
    assert place.variants()["sentiment"] == {"fp16": "sentiment"}
    assert verify_digests(place.folder).problems == []


def with_golden(place: Place) -> None:
    """An engine whose golden request is to be answered with 0.25 and 0.75."""
    folder = place.built("sentiment", "int8")
    request = {"text": "good", "tokens": [3], "answer": packed([0.25, 0.75])}
    golden = {"format": 1, "labels": ["negative", "positive"], "requests": [request]}
    (folder / "golden.json").write_text(json.dumps(golden))
    place.rebuild("sentiment", "int8", b"with golden requests")


def said(**scores: float) -> Arrays:
    names = sorted(scores, key=lambda name: -scores[name])
    labels = np.array([[name.encode() for name in names]], dtype=object)
    return {"labels": labels, "scores": np.array([[scores[name] for name in names]], dtype=np.float32)}


def test_golden_requests_are_asked_over_the_network_before_the_disk_says_so(place: Place) -> None:
    with_golden(place)
    place.server.answers[2] = said(negative=0.26, positive=0.74)
    outcome = next(found for found in place.deploy() if found.name == "sentiment")
    assert (outcome.action, outcome.probed, outcome.golden) == ("replace", 1, 1)


def test_an_answer_that_is_not_its_own_brings_the_old_version_back(place: Place) -> None:
    with_golden(place)
    place.server.answers[2] = said(negative=0.75, positive=0.25)
    with pytest.raises(ServerError, match=r"version 2: its golden requests: on average 2\.197 in log"):
        place.deploy()
    assert place.server.loads == [("sentiment", 2), ("sentiment", 1)]
    assert place.server.serving()["sentiment"] == [1]
    assert place.on_disk()["sentiment"] == (1, [1])
    # This number has answered requests.
    place.server.answers[3] = said(negative=0.25, positive=0.75)
    assert actions(place.deploy())["sentiment"] == ("replace", 1, 3)


def test_an_overloaded_server_is_no_reason_to_stay(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_repo.served_probe._PATIENCE_S", 0.2)
    with_golden(place)
    place.server.busy = True
    outcome = next(found for found in place.deploy() if found.name == "sentiment")
    assert (outcome.new, outcome.probed, outcome.golden) == (2, 0, 1)


def test_a_server_that_dies_while_it_is_asked_stays_at_the_old_version(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new version never answered, so it is not taken up, whatever a server says that starts."""
    monkeypatch.setattr("triton_repo.served_probe._PATIENCE_S", 0.2)
    with_golden(place)
    place.server.busy = place.server.gone_when_asked = True
    with pytest.raises(ServerError, match="sentiment version 2 stopped being served while it was asked"):
        place.deploy()
    assert place.on_disk()["sentiment"] == (1, [1])
    assert place.server.serving()["sentiment"] == [1]


def test_a_rejection_that_the_cache_keeps_is_no_answer(place: Place) -> None:
    """Triton answers the same bytes with no outputs from then on."""
    with_golden(place)
    place.server.answers[2] = {}
    outcome = next(found for found in place.deploy() if found.name == "sentiment")
    assert (outcome.new, outcome.probed, outcome.golden) == (2, 0, 1)


def test_what_killed_deploys_left_behind_goes_with_the_next(place: Place) -> None:
    """One before it had switched, and one right behind it: neither version is one to go back to."""
    for number in (2, 3):
        place.rebuild("words", "fp16", b"words %d" % number)
        place.deploy()
    folder = place.repository / "words"
    shutil.copytree(folder / "2", folder / "1")
    shutil.copytree(folder / "3", folder / "7")
    (folder / "warmup" / "other").write_text("of version 7")
    seal(folder / "7")
    assert actions(place.deploy())["words"] == ("keep", 3, 3)
    assert place.on_disk()["words"] == (3, [2, 3])
    assert sorted(path.name for path in (folder / "warmup").iterdir()) == ["text"]
    check_served(folder / "3")
    assert leftovers(place.folder) == []


def test_a_version_that_is_refused_takes_its_own_warm_up_along(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the old version would find a stranger beside it, and refuse to load."""
    write = writer._write_warmup
    monkeypatch.setattr(writer, "_write_warmup", lambda at, files: write(at, {**files, "more": b"x"}))
    place.rebuild("words", "fp16", b"bad")
    place.server.refused.add(("words", 2))
    with pytest.raises(ServerError, match="version 2 was not taken up"):
        place.deploy()
    check_served(place.repository / "words" / "1")


def test_a_removed_model_does_not_come_back_while_its_last_requests_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton_repo.deploy._DRAIN_S", 0.1)
    monkeypatch.setattr("triton_repo.deploy._SETTLE_S", 0.1)
    path = place.folder / "stack.toml"
    path.write_text(STACK.replace('["int8", "fp16"]', '["int8"]'))
    place.server.endless = True
    outcome = place.deploy()[-1]
    assert (outcome.name, outcome.action, outcome.drain_s) == ("sentiment-fp16", "remove", None)
    assert "sentiment-fp16" not in place.on_disk(), "a restart does not serve it"
    with pytest.raises(BusyError, match="sentiment-fp16: another version is still"):
        place.deploy()
    place.server.endless = False
    place.deploy()
    assert place.server.loads == []
    assert not (place.repository / "sentiment-fp16").exists()


def test_a_cached_model_that_comes_back_has_a_number_that_it_never_had(place: Place) -> None:
    """The response cache outlives a model, and would answer for the old one."""
    cached = STACK.replace('task = "classify"', 'task = "classify"\ncache = true')
    path = place.folder / "stack.toml"
    path.write_text(cached)
    place.deploy()
    assert ServedModel(place.repository / "sentiment-fp16").config.response_cache.enable
    path.write_text(cached.replace('["int8", "fp16"]', '["int8"]'))
    assert actions(place.deploy())["sentiment-fp16"] == ("remove", 2, None)
    path.write_text(cached)
    before = int(time.time())
    action, _, new = actions(place.deploy())["sentiment-fp16"]
    assert action == "add"
    assert before <= new <= time.time()
    assert place.server.serving()["sentiment-fp16"] == [new]


def test_rollback_undoes_the_last_deploy_and_no_other(place: Place) -> None:
    first = place.served("sentiment")
    place.rebuild("words", "fp16", b"words 2")
    place.deploy()
    place.rebuild("sentiment", "int8", b"sentiment 2")
    place.deploy()
    assert actions(list(place.rollout().rollback(None))) == {"sentiment": ("roll back", 2, 1)}
    assert place.served("sentiment") == first
    assert place.served("words") == b"words 2"
    assert place.server.serving() == {"sentiment": [1], "sentiment-fp16": [1], "words": [2]}
    # Repeated by accident it undoes no other deploy; that takes the model's name.
    with pytest.raises(RepositoryError, match="nothing to undo of the last deploy"):
        list(place.rollout().rollback(None))
    assert place.server.serving() == {"sentiment": [1], "sentiment-fp16": [1], "words": [2]}
    assert actions(list(place.rollout().rollback("words"))) == {"words": ("roll back", 2, 1)}
    with pytest.raises(RepositoryError, match="no earlier version of any model is kept"):
        list(place.rollout().rollback(None))
    # What was rolled back is not served by accident, and its number not given again.
    assert actions(place.deploy())["sentiment"] == ("replace", 1, 3)
    assert place.on_disk()["sentiment"] == (3, [1, 3])


def test_rollback_of_one_model(place: Place) -> None:
    place.rebuild("sentiment", "int8", b"sentiment 2")
    place.rebuild("words", "fp16", b"words 2")
    place.deploy()
    assert actions(list(place.rollout().rollback("words"))) == {"words": ("roll back", 2, 1)}
    assert place.served("sentiment") == b"sentiment 2"
    with pytest.raises(RepositoryError, match="no earlier version of words is kept"):
        list(place.rollout().rollback("words"))


def test_a_rollback_that_does_not_load_stays_where_it_is(place: Place) -> None:
    place.rebuild("words", "fp16", b"words 2")
    place.deploy()
    place.server.refused.add(("words", 1))
    with pytest.raises(ServerError, match="version 1 was not taken up"):
        list(place.rollout().rollback(None))
    assert place.on_disk()["words"] == (2, [1, 2])
    assert place.server.serving()["words"] == [2]


def test_a_card_without_room_for_both_is_said_before_anything_is_touched(place: Place) -> None:
    gib = 1 << 30
    place.rebuild("sentiment", "int8", b"large", memory={"weights": 4 * gib, "context": gib})
    place.rebuild("words", "fp16", b"small", memory={"weights": gib})
    place.deploy()  # 6 GiB of 16, less the reserve
    place.rebuild("sentiment", "int8", b"larger", memory={"weights": 10 * gib})
    place.rebuild("words", "fp16", b"small again", memory={"weights": gib})
    with pytest.raises(PlanError, match="no room for two versions of sentiment at once") as refused:
        place.deploy()
    assert "served takes 6,144 MiB, the new version 10,240 MiB" in str(refused.value)
    assert place.on_disk()["words"] == (2, [1, 2])
    assert place.server.loads == [("sentiment", 2), ("words", 2)]


def test_the_room_is_that_of_one_step_at_a_time(place: Place) -> None:
    """Two models of 5 GiB each: four are never on the card of 16 GiB together, three are."""
    gib = 1 << 30
    for number in (1, 2):
        for model, precision in (("sentiment", "int8"), ("words", "fp16")):
            place.rebuild(model, precision, b"%d" % number, memory={"weights": 5 * gib})
        place.deploy()
    assert place.server.serving() == {"sentiment": [3], "sentiment-fp16": [1], "words": [3]}


def test_a_model_whose_last_requests_run_is_not_replaced_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton_repo.deploy._DRAIN_S", 0.1)
    monkeypatch.setattr("triton_repo.deploy._SETTLE_S", 0.1)
    place.server.endless = True
    place.rebuild("words", "fp16", b"words 2")
    outcome = next(found for found in place.deploy() if found.name == "words")
    assert (outcome.new, outcome.drain_s) == (2, None)
    place.rebuild("words", "fp16", b"words 3")
    with pytest.raises(BusyError, match="words: another version is still being loaded, or answers"):
        place.deploy()
    place.server.endless = False
    assert actions(place.deploy())["words"] == ("replace", 2, 3)


def test_a_server_left_at_another_version_goes_back_to_the_disk_s(place: Place) -> None:
    """A deploy was killed between Triton's switch and the config's."""
    place.server.versions["words"] = {1: State("UNAVAILABLE", "unloaded"), 2: State("READY")}
    place.deploy()
    assert place.server.loads == [("words", 1)]
    assert place.server.serving()["words"] == [1]


def test_the_native_layout_is_refused(place: Place) -> None:
    config = place.repository / "words" / "config.pbtxt"
    config.write_text(config.read_text() + 'platform: "ensemble"\n')
    with pytest.raises(RepositoryError, match="native layout"):
        place.deploy()


def test_a_repository_of_before_is_to_be_written_again(place: Place) -> None:
    config = place.repository / "words" / "config.pbtxt"
    message = parse(config.read_text())
    message.ClearField("version_policy")
    config.write_text(str(message))
    with pytest.raises(RepositoryError, match=r"does not name one version(.|\n)*triton-repo write STACK"):
        place.deploy()


def test_a_repository_that_is_served_is_not_written_over(place: Place) -> None:
    """By this very process, which lives."""
    record = Running.of(
        os.getpid(), repository=place.repository, urls={}, log=place.folder / "log", key="key"
    )
    write_running(record)
    result = CliRunner().invoke(
        main, ["write", str(place.folder / "stack.toml"), "--build-dir", str(place.folder)]
    )
    assert result.exit_code == RepositoryError.exit_code
    assert "a server runs on it" in result.output
    assert "triton-repo deploy STACK" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["deploy", "STACK", "--precision", "fp16"], "--precision needs --model"),
        (["deploy", "STACK", "--model", "words"], "no server runs"),
        (["deploy", "STACK"], "no server runs"),
        (["rollback", "STACK"], "no server runs"),
    ],
)
def test_the_command_line_without_a_server(place: Place, words: list[str], message: str) -> None:
    path = str(place.folder / "stack.toml")
    given = [path if word == "STACK" else word for word in words]
    where = ["--build-dir", str(place.folder)] if words[0] == "deploy" else []
    if words[0] == "rollback":
        given[1] = str(place.repository)
    result = CliRunner().invoke(main, [*given, *where])
    assert result.exit_code in (2, ServerError.exit_code)
    assert message in result.output


_CHANGES = ("os.rename", "os.link", "shutil.copyfile", "shutil.rmtree")


def at_step(number: int, folder: Path, fail: Callable[[], None]) -> Callable[[], int]:
    """From now on this process's `number`th change to files below `folder` does not happen: `fail` is called.

    Returns how many there were. Of those that fill the folder aside, which nobody reads, each 60th counts.
    """
    seen, aside = [0], [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = arguments[2] if event == "open" else 0
        writes = isinstance(opened, int) and opened & (os.O_WRONLY | os.O_RDWR)
        if str(folder) not in str(arguments[:1]) or not (event in _CHANGES or writes):
            return
        if event == "os.link" or (event == "open" and ".repository.aside-" in str(arguments[0])):
            aside[0] += 1
            if aside[0] % 60:
                return
        seen[0] += 1
        if seen[0] == number:
            fail()

    sys.addaudithook(hook)
    return lambda: seen[0]


def in_child(work: Callable[[], int]) -> int:
    """The exit code of `work`, done in a process of its own: an audit hook stays for ever."""
    child = os.fork()
    if not child:
        try:
            os._exit(work())
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_restart(place: Place, contents: set[bytes]) -> None:
    """What a server started now would load: for every model one version, whole, and of its own config."""
    for model in served_versions(place.repository):
        folder = model.path(model.version)
        check_files(folder, read_manifest(folder))
        assert model.config == model.config_of(model.version)
        assert (folder / "model.py").is_file()
        assert (folder / "triton_repo" / "runtime" / "session.py").is_file()
    assert place.served("sentiment") in contents
    assert json.loads((place.folder / "stack.json").read_text())["models"].keys() == {"sentiment", "words"}


@pytest.mark.parametrize("how", ["killed", "disk full"])
def test_a_failure_at_any_step_leaves_what_a_restart_serves(place: Place, tmp_path: Path, how: str) -> None:
    """At version 2 of `sentiment`, with a third one built, a variant more and one less."""
    place.rebuild("sentiment", "int8", b"second")
    place.deploy()
    place.rebuild("sentiment", "int8", b"third")
    text = STACK.replace('["int8", "fp16"]', '["int8"]')
    text = text.replace('precisions = ["fp16"]', 'precisions = ["fp16", "int8"]')
    (place.folder / "stack.toml").write_text(text)
    place.engine_folder(place.folder / "engines", "words", "int8", "embed")
    template, steps = place, _count_steps(place.copied(tmp_path / "count"))
    assert steps > 12
    for number in range(1, steps + 1):
        place = template.copied(tmp_path / f"step-{number}")

        def die() -> None:
            os._exit(9)

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def work(place: Place = place, number: int = number) -> int:
            at_step(number, place.folder, die if how == "killed" else full)
            with contextlib.suppress(RepositoryError):  # not where something was only to be cleaned up
                place.deploy()
            # The server is where the disk is.
            assert place.server.serving()["sentiment"] == [place.on_disk()["sentiment"][0]]
            return 0

        assert in_child(work) == (9 if how == "killed" else 0), number
        check_restart(place, {b"second", b"third"})
        place.deploy(Server(place.repository))
        assert place.served("sentiment") == b"third"
        assert leftovers(place.folder) == []
        assert {path.name for path in place.repository.iterdir()} == {"sentiment", "words", "words-int8"}
        variants = {"sentiment": {"int8": "sentiment"}, "words": {"fp16": "words", "int8": "words-int8"}}
        assert place.variants() == variants, number
        assert verify_digests(place.folder).problems == [], number


def _count_steps(place: Place) -> int:
    def work() -> int:
        count = at_step(-1, place.folder, lambda: None)
        place.deploy()
        return count()

    return in_child(work)
