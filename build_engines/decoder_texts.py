"""A decoder's calibration and evaluation texts as token ids: as the server would send them, cut to a budget.

A conversation that ends with an answer becomes the prompt that the chat template makes of what came before,
and the answer after it: what the model reads and writes when it serves. A plain text is taken as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from build_engines.errors import DataError, ExportError
from build_engines.export.decoder_serving import decoder_serving
from build_engines.stack import DataRef, Model
from calibration.samples import Conversation, data_file, load_conversations
from triton_repo.runtime.chat import ChatTemplate, TemplateRefused
from triton_repo.runtime.texts import BadRequest
from triton_repo.runtime.tokenization import TokenizerRefused, read_tokenizer, tokenizing

if TYPE_CHECKING:
    from build_engines.export.decoder_weights import Decoder

Row = npt.NDArray[np.int64]

# Parameters x evaluation tokens. A token costs two operations per parameter, and every evaluation token is
# computed twice: on two cores (0.19 TFLOP/s) a model of 10.8 B parameters takes three minutes for 512 tokens,
# and 512 more to calibrate with. That is enough: INT8 changes a token's loss by a few hundredths, so that the
# standard error of the rise over 512 tokens is about 0.1%, a tenth of what the gate allows. Small models can
# do more.
_WORK = 6e12
_LEAST_TOKENS, _MOST_EVALUATION, _MOST_CALIBRATION = 512, 4096, 2048
# A text gives at most this share of the budget, and no text is cut below this many tokens for it.
_SHARE, _LEAST_ROW = 8, 64
# Fewer predictions say nothing about one percent.
_LEAST_PREDICTIONS = 64


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens of all texts together."""

    calibration: int
    evaluation: int

    @classmethod
    def of(cls, parameters: int) -> Budget:
        """By the model's size: what two cores do in minutes. Multiples of 64, the same on every machine."""
        evaluation = int(min(max(_WORK / parameters, _LEAST_TOKENS), _MOST_EVALUATION)) // 64 * 64
        return cls(min(max(evaluation // 2, _LEAST_TOKENS), _MOST_CALIBRATION), evaluation)


@dataclass(frozen=True, slots=True)
class DecoderTexts:
    """Rows of token ids, longest first, int64 [tokens] each; no calibration where none is named."""

    calibration: tuple[Row, ...]
    evaluation: tuple[Row, ...]


def load_decoder_texts(
    model: Model, decoder: Decoder, tokenizer: Path, budget: Budget | None = None
) -> DecoderTexts:
    """The model's texts through `tokenizer` (tokenizer.json) and the checkpoint's chat template.

    Texts are taken in an order that their place in the file decides, so that a file sorted by language or
    subject gives some of each; each is cut to an eighth of the budget or the model's `max_length`.

    Raises:
        DataError: evaluation data is missing or too short, or a line does not fit, by file and line; or the
            chat template refuses a conversation.
        ExportError: the tokenizer or the chat template cannot be read.
    """
    reader = _Reader(decoder, tokenizer)
    budget = budget or Budget.of(parameters(decoder))
    longest = min(model.max_length or decoder.architecture.rows, decoder.architecture.rows)
    if model.evaluation is None:
        raise DataError(
            f"model {model.name!r} has no evaluation data, so its perplexity gate cannot be judged",
            next_step=f"add to the stack file: [models.{model.name}] evaluation = "
            '"bundled:conversations:evaluation"',
        )
    evaluation = reader.rows(model.evaluation, None, budget.evaluation, longest)
    found = sum(len(row) - 1 for row in evaluation)
    if found < _LEAST_PREDICTIONS:
        raise DataError(
            f"{data_file(model.evaluation.path or model.evaluation.spec)}: {found} predicted tokens, and the "
            f"perplexity gate needs at least {_LEAST_PREDICTIONS}",
            next_step="add more texts to that file",
        )
    data = model.calibration.data
    calibration = (
        () if data is None else reader.rows(data, model.calibration.samples, budget.calibration, longest)
    )
    return DecoderTexts(calibration, evaluation)


def parameters(decoder: Decoder) -> int:
    """Weights that every token is multiplied by: all Linears, the head included."""
    architecture = decoder.architecture
    return sum(k * n for k, n in (architecture.linear_shape(name) for name in decoder.linears()))


def fill(rows: Sequence[Sequence[int]], budget: int, longest: int) -> tuple[Row, ...]:
    """Cut rows, and drop what is beyond `budget` tokens; those of fewer than two tokens predict nothing."""
    longest = min(longest, max(_LEAST_ROW, budget // _SHARE))
    kept: list[Row] = []
    for row in rows:
        ids = np.asarray(row[: min(longest, budget)], dtype=np.int64)
        if len(ids) >= 2:
            kept.append(ids)
            budget -= len(ids)
        if budget < 2:
            break
    # Rows of one length run together, without padding.
    return tuple(sorted(kept, key=len, reverse=True))


class _Reader:
    """Conversations to token ids."""

    def __init__(self, decoder: Decoder, tokenizer: Path) -> None:
        try:
            self._tokenizer: Any = read_tokenizer(tokenizer)
            chat = dict(decoder_serving(decoder)["chat"])
            source = chat.pop("template")
            tokens = {name: text for name, text in chat.items() if isinstance(text, str)}
            self._template = ChatTemplate(source, tokens) if source else None
        except (TemplateRefused, TokenizerRefused) as error:
            raise ExportError(f"{decoder.folder}: {error}") from None
        self._bos = decoder.architecture.bos_id

    def rows(self, data: DataRef, limit: int | None, budget: int, longest: int) -> tuple[Row, ...]:
        reference = data.path or data.spec
        conversations = _scattered(load_conversations(reference, limit=limit))
        path = data_file(reference)
        try:
            found = [self._ids(path, conversation) for conversation in conversations]
        except BadRequest as error:
            raise DataError(f"{path}: {error}", next_step="use other texts, or another checkpoint") from None
        return fill(found, budget, longest)

    def _ids(self, path: Path, conversation: Conversation) -> list[int]:
        if conversation.text is not None:
            return self._plain(conversation.text)
        messages = conversation.turns()
        if self._template is None:
            return self._plain("\n\n".join(message["content"] for message in messages))
        answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        return list(self._encode(self._prompt(path, self._template.render, messages) + answer, special=False))

    def _plain(self, text: str) -> list[int]:
        ids = self._encode(text, special=True)
        return ids[1:] if self._bos is not None and ids[:2] == [self._bos, self._bos] else ids

    def _encode(self, text: str, *, special: bool) -> list[int]:
        with tokenizing():
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def _prompt(
        self, path: Path, render: Callable[[list[dict[str, str]]], str], messages: list[dict[str, str]]
    ) -> str:
        """Templates that know no system message (Gemma's) get it at the start of the first question."""
        try:
            return render(messages)
        except BadRequest as error:
            if len(messages) < 2 or messages[0]["role"] != "system":
                raise DataError(f"{path}: {error}") from None
        system, first, *others = messages
        merged = {**first, "content": f"{system['content']}\n\n{first['content']}"}
        try:
            return render([merged, *others])
        except BadRequest as error:
            raise DataError(
                f"{path}: {error}",
                cause="the checkpoint's chat template allows no conversation of this form",
                next_step='use plain texts: lines {"text": "..."}',
            ) from None


def _scattered(conversations: Sequence[Conversation]) -> list[Conversation]:
    """In an order that is always the same and has nothing to do with the file's."""
    order = sorted(range(len(conversations)), key=lambda index: hashlib.sha256(str(index).encode()).digest())
    return [conversations[index] for index in order]
