"""Our FP32 decoder against Transformers: the checkpoint as PyTorch runs it, on a few texts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.decoder_stream import Stream
from build_engines.errors import ExportError
from build_engines.perplexity import Rows

if TYPE_CHECKING:
    from build_engines.export.decoder_weights import Decoder

FloatArray = npt.NDArray[np.float32]

# Beyond this Transformers, which loads the whole model in FP32, needs more memory than the build has.
MOST_PARAMETERS = 1_500_000_000
PARITY_TOLERANCE = 1e-3
_ROWS, _TOKENS = 3, 48


def check_decoder_parity(decoder: Decoder, rows: Rows, *, allow_remote_code: bool = False) -> float | None:
    """The largest absolute difference between our logits and those of Transformers in FP32, on the first
    tokens of some of `rows`; no chat template, no cache: every token of a row at once. None: not compared,
    since Transformers knows the family (EXAONE 3.5) only by the checkpoint's own code, which is not allowed.

    Raises:
        ExportError: it exceeds PARITY_TOLERANCE, or Transformers cannot load the checkpoint.
    """
    if not allow_remote_code and not _is_built_in(decoder.architecture.family):
        return None
    chosen = [row[:_TOKENS] for row in rows[:: max(1, len(rows) // _ROWS)]][:_ROWS]
    ours = stream_logits(decoder, chosen)
    worst = 0.0
    model = _load(decoder, allow_remote_code)
    for row, found in zip(chosen, ours, strict=True):
        difference = np.abs(found - _logits(model, row))
        # NaN must not hide: max() would drop it.
        worst = float(np.maximum(worst, difference.max()))
    if not worst <= PARITY_TOLERANCE:
        raise ExportError(
            f"the FP32 decoder differs from Transformers by {worst:.2e}, more than {PARITY_TOLERANCE:.0e}",
            cause="the checkpoint's architecture has a detail that the exporter does not know",
            next_step="please report it with the checkpoint's config.json",
        )
    return worst


def stream_logits(decoder: Decoder, rows: Rows) -> list[FloatArray]:
    """Logits after every token of every row, float32 [tokens, vocabulary], in FP32, layer by layer."""
    stream = Stream(decoder)
    lanes = [stream.lane([row]) for row in rows]
    for layer in range(decoder.architecture.layers):
        weights = stream.weights(layer)
        for lane in lanes:
            stream.advance(lane, layer, weights)
    states = [stream.last_norm(lane.hidden[0][0]) for lane in lanes]
    parts: list[list[FloatArray]] = [[] for _ in rows]
    for _, weight in stream.head_parts():
        for found, state in zip(parts, states, strict=True):
            found.append(stream.logits(state, weight))
    return [np.concatenate(found, axis=1) for found in parts]


def _is_built_in(family: str) -> bool:
    from transformers import CONFIG_MAPPING

    return family in CONFIG_MAPPING


def _load(decoder: Decoder, allow_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        return AutoModelForCausalLM.from_pretrained(
            decoder.folder,
            local_files_only=True,
            dtype=torch.float32,
            trust_remote_code=allow_remote_code,
            use_safetensors=True,
        ).eval()
    except Exception as error:  # transformers raises almost anything here
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"Transformers cannot load {decoder.folder}: {said}",
            cause="the checkpoint lacks a file, or needs a package or remote code",
            next_step="see whether transformers.AutoModelForCausalLM loads that folder",
        ) from error


def _logits(model: Any, row: npt.NDArray[np.int64]) -> FloatArray:
    import torch

    with torch.inference_mode():
        found = model(torch.from_numpy(np.ascontiguousarray(row))[None], use_cache=False).logits
    return np.asarray(found[0].float().numpy())
