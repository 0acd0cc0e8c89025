"""Folders and files replaced as a whole: links in a build folder lead nothing and nobody outside of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_engines.atomic import link_or_copy, locked, replaced_folder, write_text
from build_engines.errors import ArtifactError
from build_engines.manifest import run_stage


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Somebody's folder, which is to stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    return folder


def _as_it_was(outside: Path) -> bool:
    return [(path.name, path.read_text()) for path in outside.iterdir()] == [("mine.txt", "mine")]


def test_a_link_in_the_place_of_a_folder_is_replaced_and_not_followed(tmp_path: Path, outside: Path) -> None:
    out = tmp_path / "build" / "stage"
    out.parent.mkdir()
    out.symlink_to(outside)
    for content in ("first", "second"):
        with replaced_folder(out) as aside:
            (aside / "new.txt").write_text(content)
        assert not out.is_symlink()
        assert (out / "new.txt").read_text() == content
        assert _as_it_was(outside)
        assert sorted(path.name for path in out.parent.iterdir()) == [".stage.lock", "stage"]


def test_a_link_that_leads_nowhere_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    with replaced_folder(tmp_path / "out") as aside:
        (aside / "new.txt").touch()
    assert (tmp_path / "out" / "new.txt").exists()


def test_a_link_that_was_left_aside_is_removed_and_not_what_it_leads_to(
    tmp_path: Path, outside: Path
) -> None:
    (tmp_path / ".out.aside-1").symlink_to(outside)
    with replaced_folder(tmp_path / "out") as aside:
        (aside / "new.txt").touch()
    assert not (tmp_path / ".out.aside-1").is_symlink()
    assert _as_it_was(outside)


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / ".out.lock").symlink_to(outside / "mine.txt")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".out.lock", "busy"):
        pass
    with pytest.raises(ArtifactError, match=r"cannot be made: .*symbolic links"):
        run_stage(tmp_path / "out", {}, lambda _: {})
    assert _as_it_was(outside)


def test_a_file_is_not_written_through_a_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "stack.json").symlink_to(outside / "mine.txt")
    write_text(tmp_path / "stack.json", "new")
    assert (tmp_path / "stack.json").read_text() == "new"
    assert _as_it_was(outside)


def test_of_a_link_what_it_leads_to_is_linked(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "link").symlink_to("outside/mine.txt")
    (tmp_path / "deep").mkdir()
    link_or_copy(tmp_path / "link", tmp_path / "deep" / "copy")
    assert not (tmp_path / "deep" / "copy").is_symlink()
    assert (tmp_path / "deep" / "copy").read_text() == "mine"
