"""The demo LLM: a small Llama trained from scratch on the bundled conversations, with its own tokenizer.

It answers in Korean and English about reviews and nothing else, and is wrong at times. What it is for: a real
vocabulary, a chat template, a perplexity that quantization can spoil, and answers worth streaming.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from build_engines.atomic import replaced_folder
from build_engines.errors import GateError
from build_engines.training import (
    has_bfloat16,
    is_current,
    quiet_transformers,
    reproducible,
    use_own_core,
    versions,
    write_json,
)
from calibration.samples import Conversation, data_file, load_conversations, load_groups, load_texts
from triton_repo.runtime.session import sha256

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

__all__ = ["CHAT_TEMPLATE", "LlmRecipe", "train_tokenizer", "write_demo_llm", "write_tokenizer"]

_BEGIN, _END, _PAD = "<|begin|>", "<|end|>", "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# Every turn is a role token, the text and <|end|>, with nothing between: what a next turn renders begins with
# exactly the tokens that the last one left in the cache.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message['role'] + '; it is system, user or assistant') }}
    {%- elif message['role'] == 'system' and not loop.first %}
        {{- raise_exception('a system message must come first') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmRecipe:
    """The architecture and its training; a step is `rows` rows of `length` tokens on each thread."""

    vocabulary: int = 4096
    hidden: int = 256
    ffn: int = 768
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    positions: int = 2048
    length: int = 256
    rows: int = 2
    steps: int = 600
    learning_rate: float = 3e-3
    matrix_rate: float = 6e-3
    prompt_weight: float = 0.4
    seed: int = 20261120
    # Two, whatever the machine has: another number would train on other batches.
    threads: int = 2
    # What the trained model must reach on the evaluation split, per token.
    max_perplexity: float = 30.0
    checked: bool = True


def write_demo_llm(
    out: Path,
    *,
    progress: Callable[[float], None] | None = None,
    max_steps: int | None = None,
    recipe: LlmRecipe | None = None,
) -> None:
    """Write `out` as a Hugging Face folder: Llama weights in FP32, tokenizer.json, chat template.

    The folder appears only when it is complete, and is kept when it was written from the same data, recipe
    and library versions. `progress` gets the share done, 0 to 1. `max_steps` cuts the training short, and
    with it the quality check: for tests. `metrics.json` holds the perplexity on the evaluation split and the
    seconds taken; every other file is the same on the next run of one machine.

    Raises `GateError` when the perplexity is above the recipe's.
    """
    say = progress or (lambda _fraction: None)
    recipe = recipe or LlmRecipe()
    if max_steps is not None:
        recipe = replace(recipe, steps=min(max_steps, recipe.steps), checked=False)
    origin = _origin(recipe)
    if not is_current(out, origin):
        with replaced_folder(out) as folder, reproducible(), quiet_transformers():
            started = time.perf_counter()
            quality = _write(folder, recipe, say)
            seconds = round(time.perf_counter() - started, 1)
            write_json(folder / "metrics.json", {**quality, "seconds": seconds, "origin": origin})
    say(1.0)


def _origin(recipe: LlmRecipe) -> dict[str, Any]:
    names = ("conversations:train", "conversations:evaluation", "reviews:train", "ranking:train")
    return {
        "recipe": asdict(recipe),
        "data": {name: sha256(data_file(f"bundled:{name}")) for name in names},
        "code": sha256(Path(__file__)),
        "versions": versions(("tokenizers", "torch", "transformers")),
    }


def _write(folder: Path, recipe: LlmRecipe, say: Callable[[float], None]) -> dict[str, float]:
    train = load_conversations("bundled:conversations:train")
    tokenizer = write_tokenizer(folder, train, recipe.vocabulary, recipe.positions)
    say(0.02)
    model = _new_model(recipe, tokenizer)
    answer, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    documents = [_weighted(ids, answer, end, recipe.prompt_weight) for ids in _encoded(tokenizer, train)]
    _train(model, _rows(documents, recipe), recipe, lambda done: say(0.02 + 0.93 * done))
    model.eval()
    model.save_pretrained(folder)
    if not recipe.checked:
        return {}
    held_out = _encoded(tokenizer, load_conversations("bundled:conversations:evaluation"))
    perplexity = _perplexity(model, held_out)
    if perplexity > recipe.max_perplexity:
        raise GateError(
            f"the demo LLM reached perplexity {perplexity:.2f}; at most {recipe.max_perplexity} is allowed",
            cause="this machine or these library versions train differently from those it was tuned on",
            next_step="install the versions that constraints.txt pins, then run again",
        )
    return {"perplexity": round(perplexity, 4), "uniform_perplexity": float(recipe.vocabulary)}


def train_tokenizer(conversations: Sequence[Conversation], vocabulary: int) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` of at most `vocabulary` entries, special tokens first.

    It also sees the bundled reviews and passages: words the conversations lack are then not spelt in bytes.
    It prepends <|begin|> to a plain text, as Llama tokenizers do; a rendered chat brings its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    texts = [message.content for conversation in conversations for message in conversation.messages]
    texts += [review.text for review in load_texts("bundled:reviews:train")]
    for group in load_groups("bundled:ranking:train"):
        texts += [group.query, *group.passages]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[_BEGIN, _END, _PAD, *_ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = (_BEGIN, tokenizer.token_to_id(_BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", pair=f"{_BEGIN} $A {_BEGIN} $B", special_tokens=[begin]
    )
    return tokenizer


def write_tokenizer(
    folder: Path, conversations: Sequence[Conversation], vocabulary: int, positions: int
) -> Any:
    """Train a tokenizer, write it with the chat template into `folder`, return it as Transformers' class."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(conversations, vocabulary),
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=list(_ROLES),
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def _new_model(recipe: LlmRecipe, tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.positions,
            tie_word_embeddings=True,
            **ids,
        )
    )
    # Its backward pass is faster on a CPU than the fused one's, at these lengths.
    model.set_attn_implementation("eager")
    model.generation_config.update(**ids, do_sample=False)
    return model


def _encoded(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(conversation.turns(), tokenize=True, return_dict=False)
        for conversation in conversations
    ]


def _weighted(ids: list[int], answer: int, end: int, prompt_weight: float) -> list[tuple[int, float]]:
    """Each token with its weight in the loss: 1 from after `answer` up to its `end`, else `prompt_weight`.

    What a user says next is mostly chance; what the assistant answers is not, and is what to learn first.
    """
    weighted, answering = [], False
    for token in ids:
        weighted.append((token, 1.0 if answering else prompt_weight))
        answering = token == answer or (answering and token != end)
    return weighted


def _rows(documents: Sequence[Sequence[T]], recipe: LlmRecipe) -> Iterator[list[T]]:
    """Endless rows of `length` + 1 tokens, cut from the documents shuffled anew for every pass over them."""
    rng = random.Random(recipe.seed)
    order = list(range(len(documents)))
    tokens: list[T] = []
    while True:
        rng.shuffle(order)
        for i in order:
            tokens += documents[i]
            while len(tokens) > recipe.length:
                yield tokens[: recipe.length + 1]
                tokens = tokens[recipe.length :]


def _train(
    model: Any,
    rows: Iterator[list[tuple[int, float]]],
    recipe: LlmRecipe,
    report: Callable[[float], None],
) -> None:
    """Fit the next token of every turn: warm-up over a twentieth of the steps, then linear decay to 0.

    Each thread computes the gradients of its own rows on one core, which takes two thirds of the time that
    splitting every small multiplication takes, and adds in the same order on every run.
    """
    import torch

    optimizers = _optimizers(model, recipe)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    workers = [model, *(_sharing_copy(model) for _ in range(recipe.threads - 1))]
    with ThreadPoolExecutor(recipe.threads, initializer=use_own_core) as pool:
        for step in range(recipe.steps):
            scale = min(1.0, (step + 1) / (0.05 * recipe.steps)) * (1.0 - step / recipe.steps)
            for group, rate in groups:
                group["lr"] = rate * scale
            batches = [torch.tensor([next(rows) for _ in range(recipe.rows)]) for _ in workers]
            whole = sum(float(batch[:, 1:, 1].sum()) for batch in batches)
            for _ in pool.map(_add_gradients, workers, batches, [whole] * len(workers)):
                pass
            _collect_gradients(workers)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for _ in pool.map(lambda optimizer: optimizer.step(), optimizers):
                pass
            model.zero_grad()
            report((step + 1) / recipe.steps)


def _sharing_copy(model: Any) -> Any:
    """The same weights, in the same memory, with gradients of its own."""
    twin = copy.deepcopy(model)
    for own, shared in zip(twin.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    return twin


def _add_gradients(model: Any, batch: torch.Tensor, whole: float) -> None:
    """Backward through rows of (token, weight); `whole` is the weight of all rows of the step."""
    import torch

    ids, weights = batch[..., 0].long(), batch[:, 1:, 1].flatten()
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    ((_loss(logits, ids[:, 1:]) * weights).sum() / whole).backward()


def _collect_gradients(workers: Sequence[Any]) -> None:
    for twin in workers[1:]:
        for kept, added in zip(workers[0].parameters(), twin.parameters(), strict=True):
            kept.grad += added.grad
            added.grad = None


def _optimizers(model: Any, recipe: LlmRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    After 100 steps of 1,024 tokens the training loss is 2.8 with Muon and 4.7 with AdamW alone; a step takes
    a quarter longer.
    """
    import torch

    table = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not table]
    others = [p for p in model.parameters() if p.dim() == 1 or p is table]
    optimizers: list[torch.optim.Optimizer] = [
        # One for each thread; the layers' matrices come in the same order, so that each gets as much work.
        torch.optim.Muon(
            matrices[i :: recipe.threads],
            lr=recipe.matrix_rate,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        )
        for i in range(recipe.threads)
    ]
    betas = (0.9, 0.95)
    return [
        *optimizers,
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=betas, weight_decay=0.0, fused=True),
    ]


def _loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none")


def _perplexity(model: Any, documents: Sequence[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each document, in FP32."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in documents:
            tokens = torch.tensor([ids])
            losses = _loss(model(input_ids=tokens[:, :-1], use_cache=False).logits, tokens[:, 1:])
            total, count = total + float(losses.sum()), count + losses.numel()
    return math.exp(total / count)
