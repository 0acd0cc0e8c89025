"""Texts to token ids: batched, truncated as Transformers does, bounded in time for very long texts.

Texts are tokenized without special tokens and put into the tokenizer's own template afterwards. So a query is
tokenized once for all its passages, truncation is exact arithmetic on lengths, and a text's `truncated` flag
costs nothing. The template is learned from the tokenizer and checked against it on a sample at load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.texts import BadRequest

# A long text is cut before it is tokenized, at first to this many characters per token wanted.
_CHARACTERS_PER_TOKEN = 8
# Tokens beyond those kept that a cut text must still have: a word cut in two can change its own tokens only,
# and WordPiece never splits a word of more than 100 characters.
_MARGIN = 128
_GROWTH = 8
# No more of a text is ever tokenized, so that one cannot hold up the batch it is in; a text of which this
# much gives too few tokens (blanks, words longer than any token) is answered as far as it was read.
READ_CHARACTERS = 1 << 17
_SPACES = " \t\n\r"


class TokenizerRefused(Exception):
    """tokenizer.json is unreadable, or its template is not one this runtime can reproduce."""


def read_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` in a file, without the padding and truncation of its training run.

    Raises TokenizerRefused.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerRefused(f"{path}: not a tokenizer file ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def tokenizing() -> Iterator[None]:
    """What the tokenizers library raises over a text becomes BadRequest.

    That includes its panics, which are no Exceptions and would end the thread: a pattern of tokenizer.json
    that backtracks too far on a text is one.
    """
    try:
        yield
    except TokenizerRefused:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise BadRequest("the model's tokenizer fails on a text of this request") from None
        raise


@dataclass(frozen=True, slots=True)
class Row:
    """One engine row: token ids with special tokens, the segment of each, and whether tokens were dropped."""

    ids: list[int]
    types: list[int]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens around one text or a pair: `before A after`, or `before A between B after`."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[int, int, int, int, int]  # segment of: before, A, between, B, after

    @property
    def added(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def padded(
    rows: Sequence[Row], width: int, pad_id: int, inputs: Container[str]
) -> dict[str, npt.NDArray[np.int64]]:
    """Graph inputs int64 [rows, width], padded on the right; token_type_ids where `inputs` has them."""
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for position, row in enumerate(rows):
        length = len(row.ids)
        ids[position, :length] = row.ids
        mask[position, :length] = 1
    arrays = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in inputs:
        types = np.zeros((len(rows), width), dtype=np.int64)
        for position, row in enumerate(rows):
            types[position, : len(row.types)] = row.types
        arrays["token_type_ids"] = types
    return arrays


class TextTokenizer:
    """Wraps a `tokenizers` tokenizer file. Thread-safe after construction."""

    def __init__(self, path: Path, *, max_length: int) -> None:
        self._tokenizer = read_tokenizer(path)
        self.max_length = max_length
        try:
            with tokenizing():
                self._single = _learn(self._tokenizer, pair=False)
                self._pair = _learn(self._tokenizer, pair=True)
        except BadRequest:
            raise TokenizerRefused(f"{path}: it fails on short English words") from None
        if max(self._single.added, self._pair.added) >= max_length:
            raise TokenizerRefused(f"{path}: no room for text in {max_length} tokens beside the special ones")

    @property
    def vocabulary(self) -> int:
        """Ids that the tokenizer can give: 0 to this minus one."""
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return max(ids.values()) + 1

    def singles(self, texts: Sequence[str]) -> list[Row]:
        """One row per text: the first tokens are kept when the text is too long."""
        template = self._single
        room = self.max_length - template.added
        before, after = list(template.before), list(template.after)
        rows = []
        for ids, complete in self.content(texts):
            kept = before + (ids if len(ids) <= room else ids[:room]) + after
            rows.append(Row(kept, [0] * len(kept), len(ids) > room or not complete))
        return rows

    def pairs(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[Row]]:
        """Per (query, passages) group one row per passage, truncated `longest_first` as CrossEncoder does:
        whichever of the two is longer gives up tokens first."""
        flat: list[str] = []
        for query, passages in groups:
            flat.append(query)
            flat.extend(passages)
        content = iter(self.content(flat))
        answer = []
        for _, passages in groups:
            first = next(content)
            answer.append([self._pair_row(first, next(content)) for _ in passages])
        return answer

    def content(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Token ids without special tokens, and whether the text was read to its end or far enough.

        Of a long text the ids are at least the first `max_length`. It is cut at white space to a bounded
        number of characters first; if that leaves too few tokens to know the answer (long runs of blanks,
        words that become one unknown token) it is tried again with more, up to READ_CHARACTERS. No tokenizer
        forms a token across white space, so the tokens kept are those of the whole text, unless a word in it
        has more than READ_CHARACTERS.

        Raises BadRequest where the tokenizer fails on one of them; it does not say on which.
        """
        answer: list[tuple[list[int], bool]] = [([], True) for _ in texts]
        pending: Sequence[int] = range(len(texts))
        limit = _CHARACTERS_PER_TOKEN * (self.max_length + _MARGIN)
        while pending:
            cut = [bounded(texts[index], limit) for index in pending]
            with tokenizing():
                encodings = self._tokenizer.encode_batch_fast(cut, add_special_tokens=False)
            undecided = []
            for index, part, encoding in zip(pending, cut, encodings, strict=True):
                ids = encoding.ids
                decided = len(part) == len(texts[index]) or len(ids) >= self.max_length + _MARGIN
                answer[index] = (ids, decided)
                if not decided and len(part) < READ_CHARACTERS:
                    undecided.append(index)
            pending = undecided if limit < READ_CHARACTERS else ()
            limit = min(READ_CHARACTERS, limit * _GROWTH)
        return answer

    def _pair_row(self, query: tuple[list[int], bool], passage: tuple[list[int], bool]) -> Row:
        template = self._pair
        room = self.max_length - template.added
        (first, first_complete), (second, second_complete) = query, passage
        too_long = len(first) + len(second) > room
        if too_long:
            keep_first, keep_second = longest_first(len(first), len(second), room)
            first, second = first[:keep_first], second[:keep_second]
        ids = [*template.before, *first, *template.between, *second, *template.after]
        lengths = (len(template.before), len(first), len(template.between), len(second), len(template.after))
        types: list[int] = []
        for segment, length in zip(template.types, lengths, strict=True):
            types += [segment] * length
        return Row(ids, types, too_long or not (first_complete and second_complete))


def bounded(text: str, limit: int) -> str:
    """The beginning of `text`, of about `limit` characters: before a white space in the second half if there
    is one, else before the next one; of a word without end READ_CHARACTERS.

    Inside a word its end would decide: a sentencepiece model divides it as a whole, so that the first tokens
    of "aaa..." depend on how many there are.
    """
    if len(text) <= limit:
        return text
    cut = max(text.rfind(space, limit // 2, limit + 1) for space in _SPACES)
    if cut < 0:
        found = (text.find(space, limit, READ_CHARACTERS + 1) for space in _SPACES)
        cut = min((place for place in found if place >= 0), default=-1)
    if cut < 0:
        return text[:READ_CHARACTERS]
    return text[:cut].rstrip(_SPACES) or text[:cut]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths to keep of two sequences so that together they fill `room`, as `tokenizers` computes them."""
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


def _learn(tokenizer: Any, *, pair: bool) -> Template:
    """Read the special tokens off a sample, then check the template on a longer one."""
    sample = ("a b", "c") if pair else ("a b",)
    parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in sample]
    whole = tokenizer.encode(*sample)
    gaps, types, position = [], [], 0
    for part in parts:
        start = _find(whole.ids, part, position)
        gaps.append(tuple(whole.ids[position:start]))
        types += [whole.type_ids[position] if start > position else 0, whole.type_ids[start]]
        position = start + len(part)
    after = tuple(whole.ids[position:])
    last_type = whole.type_ids[position] if after else types[-1]
    if pair:
        template = Template(gaps[0], gaps[1], after, (types[0], types[1], types[2], types[3], last_type))
    else:
        template = Template(gaps[0], (), after, (types[0], types[1], 0, 0, last_type))
    _check(tokenizer, template, pair=pair)
    return template


def _check(tokenizer: Any, template: Template, *, pair: bool) -> None:
    sample = ("one two three", "four five, six") if pair else ("one two three",)
    parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in sample]
    built = [*template.before, *parts[0]]
    if pair:
        built += [*template.between, *parts[1]]
    if built + list(template.after) != tokenizer.encode(*sample).ids:
        raise TokenizerRefused("tokenizer.json: its special tokens do not simply surround the texts")


def _find(ids: list[int], part: list[int], start: int) -> int:
    for position in range(start, len(ids) - len(part) + 1):
        if ids[position : position + len(part)] == part:
            return position
    raise TokenizerRefused("tokenizer.json: its special tokens do not simply surround the texts")
