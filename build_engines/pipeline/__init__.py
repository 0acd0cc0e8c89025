"""The order of the stages, and nowhere else. An encoder: source, export, reference, precision, compile.

    build/<stack>/work/<model>/export/       what the checkpoint is: graph or description, tokenizer
    build/<stack>/work/<model>/reference/    the FP32 answers on the evaluation data
    build/<stack>/work/<model>/<precision>/  model.onnx: the typed graph, its gate passed
    build/<stack>/engines/<model>/<precision>/<target>/   engine, tokenizer.json, manifest.json

Every folder holds a record of what it was made from; what did not change is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence

from build_engines.pipeline.decoder import DecoderBuild
from build_engines.pipeline.encoder import EncoderBuild
from build_engines.pipeline.engine import check_device
from build_engines.pipeline.llm import LlmBuild
from build_engines.pipeline.model import BuiltEngine, ModelBuild, Reporter
from build_engines.plan import resolve_open
from build_engines.stack import Stack
from build_engines.targets import get_target

__all__ = ["BuiltEngine", "Reporter", "build_stack"]


def build_stack(
    stack: Stack,
    reporter: Reporter,
    *,
    models: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
) -> list[BuiltEngine]:
    """Build every engine of the stack (or of the models and targets named) and return them.

    No targets, an empty sequence: only the typed graphs, their gates passed.

    Raises:
        OnecardError: what a stage raises. Finished stages are kept, so the next run goes on from there.
    """
    names = stack.targets if targets is None else targets
    chosen = [get_target(name, portable=stack.portable) for name in names]
    for target in chosen:
        target.check()  # before hours of work, not after
        check_device(target, stack.card.compute_capability)
    stack = resolve_open(stack)
    built: list[BuiltEngine] = []
    for name in models or list(stack.models):
        model = stack.models[name]
        build: type[ModelBuild] = DecoderBuild if model.task == "generate" else EncoderBuild
        build = LlmBuild if model.target else build
        built += build(stack, stack.models[name], reporter).engines(chosen)
    return built
