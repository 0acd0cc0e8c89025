"""The two kinds of tokenizers that causal LMs have, trained on a few sentences."""

from __future__ import annotations

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "국수가 정말 맛있어요. 다음에도 다시 주문할게요!",
    "배송이 늦어서 별로였어요 :( 그래도 직원분이 친절하셨습니다.",
    "The noodles were good, the service was not. Would I order again? Perhaps.",
    "사장님 최고👍🏽 가족👨‍👩‍👧‍👦과 함께 갔어요 ❤️ 🇰🇷 1️⃣ 번!",
    "각 (각) 한국어 한국어",
    "Ünïcode — naïve café, 日本語テキスト, 中文文本。",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
END = 2


def byte_level(size: int = 420) -> Tokenizer:
    """As Llama 3, Qwen and EXAONE have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_template(tokenizer)


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """As Llama 2, Mistral, SOLAR and EEVE have it; Gemma's does not strip the first space."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: place for place, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return _with_template(tokenizer)


def metaspace() -> Tokenizer:
    """A decoder that is followed by decoding everything again."""
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _with_template(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(SPECIAL)
    # Chat markers, and text that a byte-level alphabet does not have.
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False), AddedToken("<마침 표>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer
