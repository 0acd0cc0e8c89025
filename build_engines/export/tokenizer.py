"""tokenizer.json beside the graph: the tokenizer as transformers sets it up, for use without transformers."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any, Final

from build_engines.errors import ExportError
from build_engines.export.checkpoint import read_json
from build_engines.untrusted import check_sizes

# Of a text by a tokenizer's normalizer. That of Unicode's NFKC, in sentencepiece's models, is 33.
MAX_GROWTH: Final = 256


def write_tokenizer(folder: Path, out: Path, vocabulary: int, *, truncates: bool = True) -> Path:
    """Write `out`/tokenizer.json for the checkpoint in `folder`.

    Where there is a tokenizer_config.json, transformers loads the tokenizer: it lets that file decide (lower
    case, accents) even against the checkpoint's own tokenizer.json, and the model is used through it.

    Args:
        vocabulary: rows of the embedding table; the tokenizer must not know a larger id.
        truncates: whether the server cuts long texts to the model's length; a causal LM's refuses them.

    Raises:
        ExportError: there is no usable tokenizer, or it belongs to another model.
    """
    from tokenizers import Tokenizer

    source = folder / "tokenizer.json"
    check_sizes(str(folder), {path.name: path.stat().st_size for path in folder.glob("*.*")}, ExportError)
    try:
        alone = source.is_file() and not (folder / "tokenizer_config.json").is_file()
        tokenizer = Tokenizer.from_file(str(source)) if alone else _from_transformers(folder, truncates)
    except ExportError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ExportError(
            f"{source} cannot be loaded: {error}",
            cause="the file is damaged, or needs a newer `tokenizers`",
            next_step="fetch the checkpoint again",
        ) from error
    _refuse_growth(tokenizer, source)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocabulary:
        raise ExportError(
            f"{folder}: the tokenizer knows ids up to {largest}, the embedding table has {vocabulary} rows",
            cause="they belong to different models, or tokens were added without resizing the model",
            next_step="use the tokenizer that was saved with these weights",
        )
    if not truncates:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    if _lowercases_first(folder):
        _prepend_lowercase(tokenizer)
    target = out / "tokenizer.json"
    tokenizer.save(str(target))
    return target


def _from_transformers(folder: Path, truncates: bool) -> Any:
    try:
        from transformers import AutoTokenizer

        fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises almost anything here
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"Transformers cannot load the tokenizer of {folder}: {said}",
            cause="vocabulary files are missing or damaged, or the tokenizer is custom code",
            next_step="fetch the checkpoint again, or choose one with a tokenizer.json",
        ) from error
    if truncates and fast.truncation_side != "right":
        raise ExportError(
            f"{folder}: the tokenizer keeps the end of a long text (truncation_side "
            f"{fast.truncation_side!r}), which is not supported; supported is 'right'",
            next_step='set truncation_side = "right" in tokenizer_config.json to keep the start instead',
        )
    return fast.backend_tokenizer


def _refuse_growth(tokenizer: Any, source: Path) -> None:
    """ExportError for steps that together could turn a short text into one that fills memory."""
    for part in (tokenizer.normalizer, tokenizer.decoder):
        if part is None:
            continue
        # By pickling's protocol: to_str() would write the vocabulary, too.
        growth = _growth(json.loads(part.__getstate__()))
        if growth > MAX_GROWTH:
            raise ExportError(
                f"{source}: its {type(part).__name__} makes a text {growth:.3g} times as long, more than "
                f"{MAX_GROWTH}",
                cause="no tokenizer does; the file is damaged or hostile",
                next_step="choose another checkpoint",
            )


def _growth(step: Any) -> float:
    """How much longer a text can become in this step and those inside it."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    inner = _growth([*step.get("normalizers", ()), *step.get("decoders", ())])
    kind = step.get("type")
    if kind == "Replace":
        pattern, content = step["pattern"], len(step["content"])
        # A regular expression can match between any two characters.
        return max(1, content / len(pattern["String"])) if pattern.get("String") else 1 + content
    if kind == "Prepend":
        return float(1 + len(step["prepend"]))
    if kind == "Precompiled":
        # The size of a trie, the trie, and what characters are replaced by, each ended by a zero.
        table = base64.b64decode(step["precompiled_charsmap"])
        strings = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
        return float(max(1, *map(len, strings)))
    return inner


def _lowercases_first(folder: Path) -> bool:
    """sentence-transformers lowers texts before tokenizing where its own settings say so."""
    path = folder / "sentence_bert_config.json"
    return path.is_file() and bool(read_json(path).get("do_lower_case"))


def _prepend_lowercase(tokenizer: Any) -> None:
    from tokenizers import normalizers

    steps: list[Any] = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
