"""Replace models of a running server without losing a request, and go back.

For each Triton model: the new version is written beside the old one, Triton loads it by a config of its own
(its process opens the engine, probes it with its golden requests, and is warmed up), and when it is ready
Triton sends new requests to it and lets the old version answer what it has. Until then config.pbtxt names the
old version, and a new model has none, so whatever happens, a restart serves one or the other.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from build_engines.atomic import folder_aside
from build_engines.errors import BusyError, RepositoryError, ServerError
from build_engines.stack import Stack
from triton_repo import shared_memory
from triton_repo.config_pbtxt import parse
from triton_repo.control import ControlsModels, State
from triton_repo.engine_entries import Entry
from triton_repo.room import Candidate, require_room
from triton_repo.runtime import fingerprint
from triton_repo.runtime.golden import read_golden
from triton_repo.runtime.seal import CONFIG
from triton_repo.served_probe import probe_served
from triton_repo.summary import now, served_record, usable_bytes, write_evaluation, write_summary
from triton_repo.versions import ServedModel, last_deployed, served_versions, unfinished
from triton_repo.writer import config_text, errors_of_ours, is_current, write_version

_POLL_S = 0.05
# What an LLM has begun may take long; a rollout is complete without it.
_DRAIN_S = 120.0
_SETTLE_S = 30.0

Report = Callable[[str], None]
Action = Literal["replace", "add", "remove", "keep", "roll back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What becomes of one Triton model: from version `old` (None: it is new) to `new` (None: it goes)."""

    name: str
    action: Action
    old: int | None
    new: int | None
    entry: Entry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of it. `probed` of `golden` requests were answered over the network.

    Seconds: `load_s` until it was ready, its own probe and warm-up included; `drain_s` None: the old version
    still answers what it had begun.
    """

    name: str
    action: Action
    old: int | None
    new: int | None
    load_s: float = 0.0
    probe_s: float = 0.0
    drain_s: float | None = 0.0
    probed: int = 0
    golden: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Rollout:
    """Changes to the models of one repository and the server on it; one command at a time has its lock.

    `report` hears what is being done. Every method raises ServerError for what the server refuses,
    RepositoryError for what the disk does, BusyError while another command or a model's last requests are in
    the way, PlanError where the card has no room for two versions at once; the model in question then stays
    at its old version.
    """

    def __init__(
        self, repository: Path, control: ControlsModels, report: Report, *, ready_timeout_s: float = 300.0
    ) -> None:
        self.repository = repository.absolute()
        self.control = control
        self._report = report
        self._timeout = ready_timeout_s
        self._aside = self.repository

    def deploy(
        self, stack: Stack, entries: Sequence[Entry], goes: Callable[[str], bool]
    ) -> Iterator[Outcome]:
        """Make the server serve `entries`, one after the other; what has not changed stays.

        At the end Triton models that are not among them go, of the models for which `goes` is true.
        """
        with self._writing():
            models = {model.name: model for model in served_versions(self.repository)}
            changes = self._changes(entries, models, goes)
            written, runtime = now(), fingerprint()
            texts = {c.name: config_text(c.entry, runtime, c.new) for c in changes if c.entry and c.new}
            candidates = [
                Candidate.of(change.name, change.entry.manifest, parse(texts[change.name]))
                for change in changes
                if change.entry
            ]
            require_room(list(models.values()), candidates, usable_bytes(stack))
            write_evaluation((entry.model for entry in entries), self.repository.parent)
            self._summarize()
            for change in changes:
                if change.name in models:
                    self._prune(models[change.name])
                if change.entry:
                    served = served_record(stack, change.entry, self.repository.parent, written)
                    write_version(change.entry, self._aside / change.name, texts[change.name], served)
                outcome = self._carried_out(change)
                if change.action != "keep":
                    self._summarize()
                yield outcome

    def rollback(self, model: str | None) -> Iterator[Outcome]:
        """Go back to the versions before the last deploy, or before the last one of `model`.

        Raises RepositoryError where nothing is kept to go back to, or the last deploy is undone already.
        """
        with self._writing():
            models = served_versions(self.repository)
            last = last_deployed(models, model)
            candidates = [
                Candidate.of(found.name, found.manifest(version), found.config_of(version))
                for found, version in last
            ]
            usable = last[0][0].summary(last[0][0].version)["usable_bytes"]
            require_room(models, candidates, usable)
            for found, version in last:
                change = Change(name=found.name, action="roll back", old=found.version, new=version)
                outcome = self._replace(change, found)
                self._summarize()
                yield outcome

    # --- one model ------------------------------------------------------------------------------------------

    def _carried_out(self, change: Change) -> Outcome:
        """A new version is written, aside."""
        model, written = ServedModel(self.repository / change.name), self._aside / change.name
        if change.action == "keep":
            return Outcome(name=change.name, action="keep", old=change.old, new=change.new)
        if change.new is None:
            return self._remove(change, model)
        if change.old is None:
            # Without a config a restart does not serve it.
            (written / CONFIG).unlink()
            written.rename(model.folder)
            return self._add(change, model)
        (written / str(change.new)).rename(model.path(change.new))
        # Behind it: its record is what allows these.
        for path in (written / "warmup").iterdir():
            path.replace(model.folder / "warmup" / path.name)
        return self._replace(change, model)

    def _replace(self, change: Change, model: ServedModel) -> Outcome:
        """Load a version that is on disk. On any failure the old serves on, and a new one's folder goes."""
        assert change.old is not None
        assert change.new is not None
        config = model.config_of(change.new)
        try:
            taken = self._taken_up(change, model, config)
            self._put_config(model, change.new)
        except BaseException:
            self._take_back(change, model)
            raise
        drained = self._drained(change.name, change.old)
        if change.entry is not None:
            self._prune(model)
        return Outcome(
            name=change.name, action=change.action, old=change.old, new=change.new, drain_s=drained, **taken
        )

    def _add(self, change: Change, model: ServedModel) -> Outcome:
        """Load a new model, which is on disk without its config. On any failure it goes."""
        assert change.new is not None
        try:
            taken = self._taken_up(change, model, model.config_of(change.new))
            self._put_config(model, change.new)
        except BaseException:
            self._withdraw(model)
            raise
        return Outcome(name=change.name, action="add", old=None, new=change.new, **taken)

    def _remove(self, change: Change, model: ServedModel) -> Outcome:
        self._report(f"{change.name}: unloading")
        started = time.monotonic()
        self.control.unload(change.name)
        # At once, or what starts or settles the server next would serve it again.
        self._put_aside(model.folder / CONFIG)
        gone = self._until_gone(change.name, _DRAIN_S)
        if gone:  # else the next command does it: with the folder, Triton forgets what still answers
            self._put_aside(model.folder)
        seconds = round(time.monotonic() - started, 3) if gone else None
        return Outcome(name=change.name, action="remove", old=change.old, new=None, drain_s=seconds)

    def _put_config(self, model: ServedModel, version: int) -> None:
        """From here on a restart serves this version."""
        shutil.copyfile(model.path(version) / CONFIG, self._aside / CONFIG)
        (self._aside / CONFIG).replace(model.folder / CONFIG)

    def _withdraw(self, model: ServedModel) -> None:
        """A model that was not added after all goes from the server, as far as it is there, and the disk."""
        with contextlib.suppress(ServerError):  # one that is gone will start without it
            # A load goes on in the server when nobody waits for it any more; the next command finds the rest.
            if not self._until(_quiet, model.name, self._timeout):
                return
            self.control.unload(model.name)
            self._until_gone(model.name, _SETTLE_S)
        self._put_aside(model.folder)

    def _taken_up(self, change: Change, model: ServedModel, config: Any) -> dict[str, Any]:
        """Load, probe in the model's process, warm up, switch: Triton's work; then ask over the network."""
        assert change.new is not None
        self._report(f"{change.name}: loading and probing version {change.new}")
        shared_memory.check_room(sum(group.count for group in config.instance_group))
        started = time.monotonic()
        try:
            self.control.load(config, self._timeout)
        except ServerError as error:
            raise ServerError(
                f"{change.name}: version {change.new} was not taken up: {error.message}",
                next_step=error.next_step or _stays(change),
            ) from None
        loaded = time.monotonic()
        golden = read_golden(model.path(change.new), model.manifest(change.new))
        probed = 0
        if golden:
            self._report(f"{change.name}: asking version {change.new} its golden requests")
            try:
                probed = probe_served(self.control, golden, change.name, change.new)
            except ServerError as error:
                raise ServerError(error.message, next_step=error.next_step or _stays(change)) from None
        return {
            "load_s": round(loaded - started, 3),
            "probe_s": round(time.monotonic() - loaded, 3),
            "probed": probed,
            "golden": len(golden.requests) if golden else 0,
        }

    def _take_back(self, change: Change, model: ServedModel) -> None:
        """The server goes on with, or back to, the version that config.pbtxt names."""
        old, new = change.old, change.new
        assert old is not None
        assert new is not None
        if model.version != old:  # interrupted when all was done
            return
        self._report(f"{change.name}: staying at version {old}")
        with contextlib.suppress(ServerError):  # one that is gone will start with the old version
            # A load goes on in the server when nobody waits for it any more.
            loading = State("LOADING")
            if not self._until(lambda found: found.get(new) != loading, change.name, self._timeout):
                return
            if self._states(change.name).get(old, _GONE).phase != "READY":
                self.control.load(model.config, self._timeout)
            gone = self._until(
                lambda found: found.get(new, _GONE).phase == "UNAVAILABLE", change.name, _DRAIN_S
            )
            if gone and change.entry is not None:
                self._discard(model, new)

    # --- all models -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with errors_of_ours(self.repository), folder_aside(self.repository) as self._aside:
            self._settle()
            try:
                yield
            except BaseException:
                # What was done before it; the reason for it is what matters.
                with contextlib.suppress(OSError, RepositoryError):
                    self._summarize()
                raise
            # Also where nothing changed: a command that was killed may have left it as it was before.
            self._summarize()

    def _settle(self) -> None:
        """Nothing on its way, every model at the version that config.pbtxt names, and none without one: a
        command that was killed may have left the server at another."""
        for name in self.control.states():
            if not self._until(_quiet, name, _SETTLE_S):
                raise BusyError(
                    f"{name}: another version is still being loaded, or answers what it has begun",
                    next_step="wait for it, then run again; where it never ends, restart the server",
                )
        for model in unfinished(self.repository):
            self._report(f"{model.name}: a deploy was cut off, removing it")
            self._withdraw(model)
        for model in served_versions(self.repository):
            if model.config.platform:
                raise RepositoryError(
                    f"{self.repository} has the native layout: a model is several of Triton's, which "
                    "would have to change together",
                    next_step="stop the server, then: triton-repo write STACK --native and "
                    "triton-repo serve STACK",
                )
            if self._states(model.name).get(model.version, _GONE).phase != "READY":
                self._report(f"{model.name}: back to version {model.version}, a deploy was cut off")
                self.control.load(model.config, self._timeout)
                self._until(_quiet, model.name, _DRAIN_S)

    def _changes(
        self, entries: Sequence[Entry], models: dict[str, ServedModel], goes: Callable[[str], bool]
    ) -> list[Change]:
        found = []
        for entry in entries:
            model = models.get(entry.name)
            if model is None:
                new = self._first_version(entry)
                found.append(Change(name=entry.name, action="add", old=None, new=new, entry=entry))
            elif is_current(entry, model):
                version = model.version
                found.append(Change(name=entry.name, action="keep", old=version, new=version))
            else:
                new = self._next_version(entry.name, model.kept)
                found.append(
                    Change(name=entry.name, action="replace", old=model.version, new=new, entry=entry)
                )
        wanted = {entry.name for entry in entries}
        for name, model in models.items():
            if name not in wanted and goes(model.summary(model.version)["model"]):
                found.append(Change(name=name, action="remove", old=model.version, new=None))
        return found

    def _first_version(self, entry: Entry) -> int:
        """Of a model that is not served. The server forgets one that was removed and its response cache does
        not, so a cached one's number is a time: no earlier model of this name had it."""
        return int(time.time()) if entry.model.cache else self._next_version(entry.name)

    def _next_version(self, name: str, kept: Sequence[int] = ()) -> int:
        """Greater than any that has answered: a number says which version an answer is of."""
        answered = [version for version, state in self._states(name).items() if state.served]
        return 1 + max([*kept, *answered], default=0)

    def _summarize(self) -> None:
        """stack.json by the versions that are served now."""
        models = served_versions(self.repository)
        # <model> before <model>-<precision>: where both have one precision, it is the one that is asked for.
        records = [model.summary(model.version) for model in models]
        records.sort(key=lambda record: (record["model"], record["name"]))
        write_summary(records, self.repository.parent)

    def _prune(self, model: ServedModel) -> None:
        """Leave the version that is served and the one before it. A command that was killed may have left
        more, and a version that never answered would be taken for one to go back to."""
        states = self._states(model.name)
        kept = {model.version, model.previous}
        for version in model.kept:
            if version not in kept and states.get(version, _GONE).phase == "UNAVAILABLE":
                self._discard(model, version)

    def _discard(self, model: ServedModel, version: int) -> None:
        """A version, and before it the warm-up files that no other one has: without its record they would be
        strangers in the model's folder, and no version would load beside them."""
        others = [model.beside(other) for other in model.kept if other != version]
        for name in model.beside(version).difference(*others):
            (model.folder / name).unlink(missing_ok=True)
        self._put_aside(model.path(version))

    def _put_aside(self, folder: Path) -> None:
        """Out of the repository at once; what is aside is removed at the end."""
        folder.rename(self._aside / f"{folder.parent.name}-{folder.name}-{time.monotonic_ns()}")

    # --- the server's states --------------------------------------------------------------------------------

    def _states(self, name: str) -> dict[int, State]:
        return self.control.states().get(name, {})

    def _drained(self, name: str, version: int) -> float | None:
        self._report(f"{name}: version {version} answers what it has begun")
        started = time.monotonic()
        done = self._until(lambda found: found.get(version, _GONE).phase == "UNAVAILABLE", name, _DRAIN_S)
        return round(time.monotonic() - started, 3) if done else None

    def _until_gone(self, name: str, seconds: float) -> bool:
        return self._until(lambda found: all(s.phase == "UNAVAILABLE" for s in found.values()), name, seconds)

    def _until(self, condition: Callable[[dict[int, State]], bool], name: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition(self._states(name)):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


_GONE = State("UNAVAILABLE")


def _quiet(found: dict[int, State]) -> bool:
    return all(state.phase in {"READY", "UNAVAILABLE"} for state in found.values())


def _stays(change: Change) -> str:
    if change.old is None:
        return "it is not served; the other models are not affected"
    return f"version {change.old} serves on; nothing was lost"
