"""A tokenizer that panics or fails on a text: that text's request is refused, and nothing else happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from triton_repo.runtime.detokenize import detokenizer_factory
from triton_repo.runtime.service import Reader
from triton_repo.runtime.texts import BadRequest, EngineFailed
from triton_repo.runtime.tokenization import TextTokenizer, TokenizerRefused, tokenizing

# Ends in a panic of the regular expression's library, after ten million steps.
EVIL = "z" * 40


def evil() -> Tokenizer:
    words = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("(z+)+y"), "isolated")]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("evil") / "tokenizer.json"
    evil().save(str(path))
    return TextTokenizer(path, max_length=16)


def texts(*values: str) -> dict[str, Any]:
    return {"text": np.array([value.encode() for value in values], dtype=object).reshape(-1, 1)}


def test_the_text_alone_is_refused(tokenizer: TextTokenizer) -> None:
    reader = Reader("embed", tokenizer, refuse=False)
    first, second, third = reader.rows([texts("a b"), texts("c", EVIL), texts("c")])
    assert isinstance(second, BadRequest)
    assert str(second) == "the model's tokenizer fails on a text of this request"
    assert not isinstance(first, BadRequest)
    assert not isinstance(third, BadRequest)
    assert [row.ids for row in first[1]] == [[1, 2]]
    assert [row.ids for row in third[1]] == [[3]]


def test_a_panic_of_rust_is_no_exception_and_yet_caught(tokenizer: TextTokenizer) -> None:
    with pytest.raises(BadRequest, match="fails on a text"):
        tokenizer.singles([EVIL])
    with pytest.raises(BadRequest, match="fails on a text"):
        tokenizer.pairs([("a", ["b", EVIL])])


def test_an_interrupt_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt), tokenizing():
        raise KeyboardInterrupt


def test_a_tokenizer_that_fails_on_every_word(tmp_path: Path) -> None:
    """It has no token for what it does not know."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"x": 0}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(TokenizerRefused, match=r"tokenizer\.json: it fails on short English words"):
        TextTokenizer(path, max_length=16)


class _Broken:
    """A tokenizer whose decoder is of no kind that is followed step by step, and fails."""

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def to_str(self) -> str:
        return '{"decoder": null}'

    def decode(self, tokens: list[int]) -> str:
        raise RuntimeError("text of a user")


def test_a_decoder_that_fails_ends_the_generation() -> None:
    detokenizer = detokenizer_factory(_Broken())()
    with pytest.raises(EngineFailed) as failure:
        detokenizer.push(1)
    assert str(failure.value) == "the model's tokenizer cannot write what was generated"
