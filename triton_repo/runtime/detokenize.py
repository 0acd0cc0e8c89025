"""Token ids to text, one at a time: what is given out never has to be taken back.

The joined pieces equal the tokenizer's own decoding of all tokens, special tokens left out, also for token
sequences that are no valid UTF-8. The two decoders that causal LMs have are followed step by step (bytes of
byte-level BPE; pieces with byte fallback); any other is asked for the whole text again with every token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from typing import Any, Protocol

from triton_repo.runtime.texts import BadRequest, EngineFailed
from triton_repo.runtime.tokenization import tokenizing

# Byte-fallback tokens are a text only when all that follow each other are valid UTF-8 together, so that
# they are held back until another token comes; a run of more than this is given out as far as it is valid.
HELD_BYTES = 64
_REPLACEMENT = "�"


class Detokenizer(Protocol):
    """The text of one sequence of tokens."""

    def push(self, token: int) -> str:
        """Text that became certain with this token; may be empty."""
        ...

    def flush(self) -> str:
        """The rest, as if no token followed."""
        ...

    def pending(self) -> str:
        """Whole characters that `flush` would give now and a token that follows might change."""
        ...


def detokenizer_factory(tokenizer: Any) -> Callable[[], Detokenizer]:
    """What makes a Detokenizer per sequence for a `tokenizers.Tokenizer`."""
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    pieces: dict[int, Any] = {}
    if decoder.get("type") == "ByteLevel":
        to_bytes = _byte_of_character()

        def piece_bytes(token: int) -> bytes:
            name = None if token in special else tokenizer.id_to_token(token)
            return _byte_level(name or "", to_bytes)

        return lambda: _ByteLevelText(pieces, piece_bytes)
    rule = _fallback_rule(decoder)
    if rule is not None:
        mark, space, stripped = rule

        def piece(token: int) -> str | int:
            name = None if token in special else tokenizer.id_to_token(token)
            return _fallback_piece(name or "", mark, space)

        return lambda: _FallbackText(pieces, piece, stripped)
    return lambda: _WholeText(tokenizer)


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, U+0100 and on for the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if chr(byte) not in table]
    return table | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


def _byte_level(name: str, to_bytes: dict[str, int]) -> bytes:
    try:
        return bytes(to_bytes[character] for character in name)
    except KeyError:  # an added token's name is text
        return name.encode()


class _ByteLevelText:
    def __init__(self, pieces: dict[int, bytes], piece: Callable[[int], bytes]) -> None:
        self._pieces = pieces
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(token)
        return self._decoder.decode(piece)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def pending(self) -> str:
        return ""


def _fallback_rule(decoder: dict[str, Any]) -> tuple[str, str, str] | None:
    """(mark, what replaces it, what the text loses at its start) of a byte-fallback decoder, or None."""
    steps = list(decoder.get("decoders", ()))
    mark = space = stripped = ""
    if steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        first = steps.pop(0)
        mark, space = first["pattern"]["String"], first["content"]
    if [step["type"] for step in steps[:2]] != ["ByteFallback", "Fuse"]:
        return None
    if len(steps) == 3 and steps[2]["type"] == "Strip" and steps[2]["stop"] == 0:
        stripped = steps[2]["content"] * steps[2]["start"]
    elif len(steps) > 2:
        return None
    return mark, space, stripped


def _fallback_piece(name: str, mark: str, space: str) -> str | int:
    """A token's text, or the byte that it stands for."""
    text = name.replace(mark, space) if mark else name
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            pass
    return text


class _FallbackText:
    def __init__(
        self, pieces: dict[int, str | int], piece: Callable[[int], str | int], stripped: str
    ) -> None:
        self._pieces = pieces
        self._piece = piece
        self._stripped = stripped
        self._run = bytearray()  # bytes that follow each other and are not given out yet
        self._long = False  # their run is given out as it comes
        self._broken = False  # their run is not valid UTF-8, so that each byte of it becomes a replacement

    def push(self, token: int) -> str:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(token)
        if isinstance(piece, int):
            return self._start(self._add(piece))
        if not piece:  # special tokens are left out before bytes are joined
            return ""
        return self._start(self._end_run() + piece)

    def flush(self) -> str:
        return self._start(self._end_run())

    def pending(self) -> str:
        try:
            return self._run.decode()
        except UnicodeDecodeError:
            return ""

    def _add(self, byte: int) -> str:
        if self._broken:
            return _REPLACEMENT
        self._run.append(byte)
        try:
            text, used = codecs.utf_8_decode(self._run, "strict", False)
        except UnicodeDecodeError:
            self._broken = True
            count = len(self._run)
            self._run.clear()
            return _REPLACEMENT * count
        self._long = self._long or len(self._run) > HELD_BYTES
        if not self._long:
            return ""
        del self._run[:used]
        return text

    def _end_run(self) -> str:
        run, self._run, self._broken, self._long = self._run, bytearray(), False, False
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _start(self, text: str) -> str:
        """`text` less what the whole text loses at its start."""
        while self._stripped and text:
            if text[0] != self._stripped[0]:
                self._stripped = ""
            else:
                text, self._stripped = text[1:], self._stripped[1:]
        return text


class _WholeText:
    """Any decoder: decode everything every time, and give out what two decodings in a row agree on."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0
        self._before = ""

    def push(self, token: int) -> str:
        self._tokens.append(token)
        try:
            with tokenizing():
                text: str = self._tokenizer.decode(self._tokens)
        except BadRequest:
            raise EngineFailed("the model's tokenizer cannot write what was generated") from None
        same = len(self._before)
        while text[:same] != self._before[:same]:
            same -= 1
        self._before = text
        return self._give(text[:same].rstrip(_REPLACEMENT))

    def flush(self) -> str:
        return self._give(self._before)

    def pending(self) -> str:
        return self._before[self._given :].rstrip(_REPLACEMENT)

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new
