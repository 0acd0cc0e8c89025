"""The models of a stack summary that generate, their engines' manifests, and the prompts for them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BenchError
from .summary import REBUILD, field_of, is_text, is_text_map, read_json

# Of config.pbtxt: the version that is served.
_VERSION = re.compile(r"version_policy.*?versions: (\d+)", re.DOTALL)
SYNTHETIC_TOKENS = 128
SMALLEST_NUMBER = 10_000_000  # so that the numbers that make prompts distinct are all of one length


@dataclass(frozen=True, slots=True)
class Prompt:
    """What both sides continue: messages for the chat template, or a text as it is."""

    messages: tuple[Mapping[str, str], ...] = ()
    text: str = ""

    def distinct(self, number: int) -> Prompt:
        """The same with `number` before its first text: no other prompt's cached beginning serves for it."""
        if not self.messages:
            return Prompt(text=f"{number}. {self.text}")
        first = {**self.messages[0], "content": f"{number}. {self.messages[0]['content']}"}
        return Prompt(messages=(first, *self.messages[1:]))

    def plain(self) -> list[Any]:
        """As JSON for the baseline's process."""
        return [list(self.messages), self.text]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchGenerator:
    """One generating model: its checkpoint, its served variants, and its evaluation conversations."""

    name: str
    source: Path
    variants: Mapping[str, str]  # precision -> Triton model name
    slots: int
    capacity: int
    repository: Path
    prompts: tuple[Prompt, ...]

    def manifest(self, precision: str) -> tuple[Path, dict[str, Any]] | None:
        """The served engine's folder and manifest, when the repository lies beside the summary."""
        model = self.repository / self.variants[precision]
        try:
            served = _VERSION.search((model / "config.pbtxt").read_text("utf-8"))
            folder = model / (served[1] if served else "1")
            return folder, json.loads((folder / "manifest.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None


def read_generators(path: Path, only: tuple[str, ...] = ()) -> tuple[BenchGenerator, ...]:
    """Those of the models to measure that generate; BenchError names the file and the field that is wrong."""
    models = read_json(path).get("models")
    if not isinstance(models, dict):
        return ()  # read_summary says what is wrong
    chosen = {name: entry for name, entry in models.items() if not only or name in only}
    return tuple(
        _read_model(path, name, entry)
        for name, entry in chosen.items()
        if isinstance(entry, dict) and entry.get("task") == "generate"
    )


def _read_model(path: Path, name: str, entry: dict[str, Any]) -> BenchGenerator:
    where = f"{path}: models.{name}"

    def count(field: str) -> int:
        return int(
            field_of(where, entry, field, lambda v: type(v) is int and v > 0, "a whole number above 0")
        )

    source = Path(field_of(where, entry, "source", is_text, "the checkpoint's folder"))
    if not source.is_dir():
        raise BenchError(
            f"{where}.source: {source} is not a folder; the baseline needs the checkpoint",
            next_step="build the stack on this machine first",
        )
    variants = field_of(where, entry, "variants", is_text_map, "precisions with their Triton model names")
    evaluation = entry.get("evaluation")
    if not (evaluation is None or is_text(evaluation)):
        raise BenchError(f"{where}.evaluation: {evaluation!r} is not a path", next_step=REBUILD)
    return BenchGenerator(
        name=name,
        source=source,
        variants=variants,
        slots=count("slots"),
        capacity=count("capacity"),
        repository=path.absolute().parent / "repository",
        prompts=read_prompts(Path(evaluation)) if evaluation else (),
    )


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """From JSONL of {"messages"} or {"text"}; what the assistant says last is not part of the prompt."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})", next_step=REBUILD) from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_prompt(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise BenchError(f"{path}, line {number}: not a conversation ({error!r})") from None
    if not prompts:
        raise BenchError(f"{path}: holds no record")
    return tuple(prompts)


def _prompt(record: dict[str, Any]) -> Prompt:
    if "messages" not in record:
        if not is_text(record["text"]):
            raise ValueError("text is not a non-empty string")
        return Prompt(text=record["text"])
    turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in record["messages"]]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ValueError("no message of a user")
    return Prompt(messages=tuple(turns))


def choose(prompts: Sequence[Prompt], count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of middle length, so that a few of them are like any others; shuffled alike in every
    run, repeated when there are fewer."""
    ordered = sorted(prompts, key=_length)
    start = max(0, (len(ordered) - count) // 2)
    chosen = ordered[start : start + count]
    random.Random(seed).shuffle(chosen)
    return [chosen[place % len(chosen)] for place in range(count)]


def _length(prompt: Prompt) -> int:
    return len(prompt.text) + sum(len(turn["content"]) for turn in prompt.messages)
