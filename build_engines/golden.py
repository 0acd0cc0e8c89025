"""Golden requests: a few evaluation texts and what the finished engine answers to them, beside the engine.

The served model asks itself the same before it takes requests (triton_repo.runtime.probe). Only an engine
that has run here has any: what a graph answers on the CPU is not what a GPU's kernels will.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from build_engines.stack import DataRef
from calibration.samples import Conversation, load_conversations
from triton_repo.runtime.chat import ChatTemplate, read_messages
from triton_repo.runtime.encode import Encoder
from triton_repo.runtime.engines import open_decoder_engine
from triton_repo.runtime.generation import GenerationService
from triton_repo.runtime.golden import FILE, FORMAT, packed
from triton_repo.runtime.probe import encoder_rows
from triton_repo.runtime.scheduler import Scheduler
from triton_repo.runtime.texts import BadRequest, EngineFailed
from triton_repo.runtime.tokenization import read_tokenizer

FloatArray = npt.NDArray[np.float32]

# A probe should cost a start no more than its warm-up does, and texts no more room than they must.
_TEXTS, _GROUPS, _PASSAGES, _PROMPTS, _TOKENS = 8, 4, 4, 4, 8
_CHARACTERS = 1000
# Of so many prompts those are recorded whose greedy tokens are clear for longest.
_CANDIDATES = 8
# Nats that a token must be ahead: another kernel may turn round what is closer.
_CLEAR = 0.5


def record_encoder(folder: Path, texts: Sequence[str], groups: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Write golden.json into a finished engine folder: evaluation texts of all lengths and their answers.

    `groups` are a reranker's queries with their passages, `texts` the other encoders'.
    Raises EngineFailed where the engine breaks on one.
    """
    encoder = Encoder.open(folder)
    try:
        serving = encoder.engine.manifest["serving"]
        requests = _encoder_requests(texts, groups)
        rows = encoder_rows(encoder.tokenizer, encoder.task, requests)
        values = iter(encoder.encode([row for group in rows for row in group]))
        recorded = []
        for request, group in zip(requests, rows, strict=True):
            found = [next(values) for _ in group]
            for value in found:
                if isinstance(value, EngineFailed):
                    raise value
            # The server would refuse it.
            if serving["overflow"] == "refuse" and any(row.truncated for row in group):
                continue
            counts = [len(row.ids) for row in group]
            recorded.append({**request, "tokens": counts, "answer": packed(np.array(found))})
    finally:
        encoder.close()
    _write(folder, recorded, serving.get("labels") or ())


def record_generator(folder: Path, evaluation: DataRef) -> None:
    """Write golden.json into a finished engine folder: evaluation prompts and what follows them greedily."""
    engine = open_decoder_engine(folder)
    service = GenerationService(engine, read_tokenizer(folder / "tokenizer.json"), Scheduler(engine))
    try:
        serving = engine.manifest["serving"]
        conversations = load_conversations(evaluation.path or evaluation.spec)
        texts = _spread(sorted(_prompts(conversations, serving["chat"]), key=len), _CANDIDATES)
        found = []
        for text in texts:
            cut, ids = _fitting(service, text, max(1, engine.capacity - _TOKENS))
            greedy = _greedy(engine, ids, frozenset(serving["eos_ids"]))
            found.append({"text": cut, "tokens": len(ids), **greedy})
    finally:
        service.close()
    found.sort(key=lambda request: -len(request["token_ids"]))
    _write(folder, found[:_PROMPTS], ())


def _write(folder: Path, requests: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    if requests:
        golden = {"format": FORMAT, "labels": list(labels), "requests": list(requests)}
        (folder / FILE).write_text(json.dumps(golden, ensure_ascii=False), encoding="utf-8")


def _encoder_requests(
    texts: Sequence[str], groups: Sequence[tuple[str, Sequence[str]]]
) -> list[dict[str, Any]]:
    cut = sorted(dict.fromkeys(text[:_CHARACTERS] for text in texts), key=len)
    singles = [{"text": text} for text in _spread(cut, _TEXTS) if not text.isspace()]
    ordered = sorted(groups, key=lambda group: sum(map(len, group[1])))
    return singles + [
        {
            "query": query[:_CHARACTERS],
            "passages": [passage[:_CHARACTERS] for passage in passages[:_PASSAGES]],
        }
        for query, passages in _spread(ordered, _GROUPS)
    ]


def _spread(ordered: Sequence[Any], count: int) -> list[Any]:
    """`count` of them, from the first to the last at equal distances; all where there are no more."""
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def _prompts(conversations: Sequence[Conversation], chat: Mapping[str, Any]) -> list[str]:
    """Each conversation as the text that the model reads: what templates say of today is recorded with it."""
    settings = dict(chat)
    source = settings.pop("template", None)
    tokens = {name: token for name, token in settings.items() if isinstance(token, str)}
    template = ChatTemplate(source, tokens) if source else None
    return list(dict.fromkeys(_prompt(conversation, template) for conversation in conversations))


def _prompt(conversation: Conversation, template: ChatTemplate | None) -> str:
    if conversation.text is not None:
        return conversation.text
    messages = conversation.turns()
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()
    if template is not None:
        try:
            return template.render(read_messages(messages))
        except BadRequest:  # one without system messages, for instance
            pass
    return "\n\n".join(message["content"] for message in messages)


def _fitting(service: GenerationService, text: str, most: int) -> tuple[str, list[int]]:
    """The text, cut where its tokens are more than `most`, and its tokens."""
    text = text[:_CHARACTERS]
    while len(ids := service.prompt({"text": text})) > most and len(text) > 1:
        text = text[: len(text) // 2]
    return text, ids


def _greedy(engine: Any, prompt: Sequence[int], eos: frozenset[int]) -> dict[str, Any]:
    """Tokens and their log probabilities, up to one that is not well ahead of all others: only the latter."""
    for start in range(0, len(prompt), engine.chunk):
        logits = engine.prefill(0, prompt[start : start + engine.chunk], start)
    token_ids: list[int] = []
    logprobs: list[float] = []
    while len(token_ids) < _TOKENS:
        second, token = (int(place) for place in np.argpartition(logits, -2)[-2:])
        logprobs.append(round(-float(np.log(np.exp((logits - logits[token]).astype(np.float64)).sum())), 4))
        if logits[token] - logits[second] < _CLEAR:
            break
        token_ids.append(token)
        if token in eos:
            break
        logits = engine.decode([0], [token], [len(prompt) + len(token_ids) - 1])[0]
    return {"token_ids": token_ids, "logprobs": logprobs}
