"""The flagship's script with a tiny model: the same processes, the same stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from build_engines import flagship
from build_engines.errors import ArtifactError
from build_engines.flagship import EEVE, RandomLlama, Step, build_seconds, check_disk, needed_bytes

TINY = RandomLlama(
    layers=1, hidden=128, ffn=192, heads=4, kv_heads=2, vocabulary=700, positions=2048, tied=False
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flagship") / "new"


@pytest.fixture(scope="module")
def steps(folder: Path) -> list[Step]:
    pytest.importorskip("tensorrt_rtx", reason="the TensorRT-RTX builder is not installed")
    return flagship.run_flagship(folder, TINY)


def test_every_step_runs_in_a_process_of_its_own_and_says_what_it_took(
    steps: list[Step], folder: Path, tmp_path: Path
) -> None:
    assert [step.name for step in steps] == ["checkpoint", "graph", "engine"]
    for step in steps:
        assert 0 < step.anonymous < step.resident
        assert step.seconds > 0
        assert step.written > 0
        assert step.as_dict()["peak_resident_bytes"] == step.resident
    assert build_seconds(steps) == steps[1].seconds + steps[2].seconds
    engine = folder / "build" / "engines" / "assistant" / "int8-weights" / "tensorrt-rtx"
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["compute_capability"] == "12.0"
    assert manifest["profile"] == {"slots": 6, "capacity": 2048, "chunk": 128}
    assert manifest["layers"]["ATTENTION"] == 1
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(flagship.render_steps(steps, folder))
    text = console.export_text()
    assert "compile for 12.0" in text
    assert "peak anonymous GB" in text
    assert "minutes (at most 15: yes)" in text


def test_a_step_that_fails_or_is_killed_says_which(steps: list[Step], folder: Path, monkeypatch: Any) -> None:
    shard = next((folder / "checkpoint").glob("*.safetensors"))
    broken = folder.parent / "broken"
    shutil.copytree(folder / "checkpoint", broken / "checkpoint")
    (broken / "checkpoint" / shard.name).unlink()
    with pytest.raises(ArtifactError, match="'INT8, its gate, the graph' failed after"):
        flagship._run_step("graph", broken, TINY)
    ended = SimpleNamespace(pid=0, returncode=-9, poll=lambda: -9)
    monkeypatch.setattr(flagship.subprocess, "Popen", lambda _: ended)
    with pytest.raises(ArtifactError, match="was killed") as caught:
        flagship._run_step("engine", folder, TINY)
    assert "out of memory" in str(caught.value)


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    assert needed_bytes(EEVE) == pytest.approx(45e9, rel=0.001)
    monkeypatch.setattr(flagship.shutil, "disk_usage", lambda _: SimpleNamespace(free=44_000_000_000))
    out = tmp_path / "a" / "b"
    with pytest.raises(ArtifactError, match=r"needs 45 GB of disk, and 44\.0 GB are free"):
        flagship.run_flagship(out)
    assert not out.parent.exists()
    # What is there from an earlier run counts.
    out.mkdir(parents=True)
    with (out / "part").open("wb") as file:
        file.truncate(1_100_000_000)
    check_disk(out, EEVE)


def test_the_checkpoint_comes_in_shards(tmp_path: Path) -> None:
    from build_engines.export import open_decoder
    from build_engines.random_model import write_random_llm

    write_random_llm(tmp_path / "sharded", TINY, shard_bytes=200_000)
    write_random_llm(tmp_path / "whole", TINY)
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert [path.name[6:] for path in shards] == [
        f"{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(
        size for size in (2 * 700 * 128, 3 * 128, 2 * 128 * 128, 2 * 128 * 64, 3 * 128 * 192)
    )
    sharded, whole = open_decoder(tmp_path / "sharded"), open_decoder(tmp_path / "whole")
    for name in whole.linears():
        assert (sharded.weight(name) == whole.weight(name)).all()
