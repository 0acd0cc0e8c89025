"""The generating part of the bench without a server or torch: data, figures, probes, document, page."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import fake_llm
import pytest
from rich.console import Console
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, serialize_byte_tensor

from client import BenchError, QueueFull
from client.bench import generate_command, generate_data, generate_probe, generate_worker, table
from client.bench.generate_baseline import Speed
from client.bench.generate_data import Prompt, choose, read_generators
from client.bench.generate_load import Streamer, StreamPoint, Timed, point, raise_failure, serialize
from client.bench.loadgen import grpc_failure
from client.bench.report import render
from client.bench.summary import read_summary


def summary(tmp_path: Path, **changes: Any) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"text": "plain"},
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    entry = {
        "task": "generate",
        "source": str(tmp_path),
        "variants": {"int8-weights": "llm"},
        "evaluation": str(tmp_path / "talk.jsonl"),
        "slots": 8,
        "capacity": 512,
        **changes,
    }
    path = tmp_path / "stack.json"
    path.write_text(json.dumps({"models": {"llm": entry}}), "utf-8")
    return path


def test_generators_are_read_beside_the_encoders(tmp_path: Path) -> None:
    [model] = read_generators(summary(tmp_path))
    assert (model.name, model.slots, model.capacity) == ("llm", 8, 512)
    # What the assistant said last is the answer, not the prompt.
    assert model.prompts == (Prompt(messages=({"role": "user", "content": "q"},)), Prompt(text="plain"))
    assert read_summary(tmp_path / "stack.json") == ()
    assert read_generators(tmp_path / "stack.json", ("other",)) == ()
    assert model.manifest("int8-weights") is None
    folder = tmp_path / "repository" / "llm" / "12"  # the served one, not the first
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text("version_policy {\n  specific {\n    versions: 12\n  }\n}\n")
    (folder / "manifest.json").write_text('{"engine": {"file": "engine.onnx"}}')
    assert model.manifest("int8-weights") == (folder, {"engine": {"file": "engine.onnx"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 0}, "models.llm.slots: 0 is not a whole number"),
        ({"capacity": None}, "capacity"),
        ({"source": "/nowhere"}, "not a folder"),
        ({"variants": {}}, "variants"),
        ({"evaluation": 3}, "evaluation"),
        ({"evaluation": "/nowhere.jsonl"}, "cannot be read"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_generators(summary(tmp_path, **changes))


@pytest.mark.parametrize(
    "line", ["{", '{"messages": [{"role": "assistant", "content": "x"}]}', '{"text": ""}']
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n', "utf-8")
    with pytest.raises(BenchError, match=r"x\.jsonl, line 3"):
        generate_data.read_prompts(path)


def test_prompts_of_a_run_are_of_middle_length_and_begin_differently() -> None:
    prompts = [Prompt(text="x" * size) for size in range(1, 31)]
    chosen = choose(prompts, 10)
    assert sorted(len(prompt.text) for prompt in chosen) == list(range(11, 21))
    assert chosen == choose(prompts, 10)
    assert len(choose(prompts[:3], 9)) == 9
    assert Prompt(text="t").distinct(5).text == "5. t"
    system = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert Prompt(messages=system).distinct(5).messages[0] == {"role": "system", "content": "5. s"}


def response(text: str, tokens: int, **last: Any) -> bytes:
    message = service_pb2.ModelInferResponse(model_name="m")
    for name, values in fake_llm.arrays([text], [0], [tokens], **last).items():
        message.outputs.add(name=name, datatype=np_to_triton_dtype(values.dtype), shape=values.shape)
        raw = serialize_byte_tensor(values).item() if values.dtype == object else values.tobytes()
        message.raw_output_contents.append(raw)
    return service_pb2.ModelStreamInferResponse(infer_response=message).SerializeToString()


def timed(start: float, *pieces: tuple[float, int], cached: int = 0) -> Timed:
    made = Timed(start)
    for place, (at, tokens) in enumerate(pieces):
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "cached_tokens": cached}
        end = {"usage": usage} if place == len(pieces) - 1 else {}
        made.times.append(at)
        made.raw.append(response("x", tokens, **end))
    return made.read()


def test_figures_are_of_the_window_and_per_token() -> None:
    a = timed(1.0, (1.2, 1), (1.3, 1), (1.7, 4), cached=25)  # 0.1 s, then 4 tokens in 0.4 s
    b = timed(0.5, (0.9, 1), (1.1, 1), (2.5, 1))  # began before the window, ends after it
    found = point([a, b], 1.0, 2.0)
    assert (found.requests, found.tokens, found.tokens_per_s) == (1, 7, 7.0)
    assert found.first_p50_ms == pytest.approx(200)
    assert found.inter_p50_ms == pytest.approx(100)
    assert found.inter_p99_ms == pytest.approx(200)  # b's second piece
    assert found.pause_ms == pytest.approx(400)
    assert found.cached_share == 0.125
    assert (found.prompt_tokens_mean, found.prompt_tokens_max) == (100, 100)
    with pytest.raises(BenchError, match="no stream was answered"):
        point([b], 1.0, 2.0)


def test_a_failure_in_a_stream_is_raised() -> None:
    raise_failure(response("x", 1))
    failed = service_pb2.ModelStreamInferResponse(error_message="the queue is full: 9 requests")
    with pytest.raises(InferenceServerException, match="queue is full") as caught:
        raise_failure(failed.SerializeToString())
    assert isinstance(grpc_failure(caught.value, "a:1", "m"), QueueFull)  # a rejection, to the load


def test_a_piece_without_a_token_is_no_first_token() -> None:
    late = timed(0.0, (0.1, 0), (0.5, 1), (0.6, 0), (0.9, 2))
    assert late.first_s == 0.5
    assert [(round(gap, 3), count) for gap, count, _ in late.gaps(0, 9)] == [(0.4, 2)]
    assert timed(0.0, (0.1, 0)).first_s is None


def test_the_steady_rate_is_of_the_time_when_all_streams_decode() -> None:
    streams = [
        timed(0.0, (0.1, 1), (0.5, 5), (1.0, 5), (1.5, 5)),  # the first to end
        timed(0.0, (0.4, 1), (1.2, 4), (1.5, 2), (2.0, 9)),  # the last to begin
    ]

    class Fixed(Streamer):
        async def run(self, payload: bytes, given: Timed | None = None) -> Timed:
            return streams[int(payload)]

    rate = asyncio.run(Fixed("").steady([b"0", b"1"]))
    assert rate == pytest.approx((5 + 5 + 5 + 4 + 2) / 1.1)
    streams[0] = timed(0.0, (0.1, 1), (0.3, 1))  # ended before the other began
    assert asyncio.run(Fixed("").steady([b"0", b"1"])) is None


def test_requests_are_greedy_and_go_past_the_end() -> None:
    message = service_pb2.ModelInferRequest.FromString(serialize("llm", Prompt(text="t"), 48))
    names = {tensor.name for tensor in message.inputs}
    assert names == {"text", "max_tokens", "temperature", "ignore_eos", "stream"}
    chat = Prompt(messages=({"role": "user", "content": "한"},))
    message = service_pb2.ModelInferRequest.FromString(serialize("llm", chat, 4, ignore_eos=False))
    assert "한".encode() in message.raw_input_contents[0]


class FakeStreamer:
    """Answers at once with `answer(prompt)`: text, prompt tokens and cached tokens."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def run(self, payload: bytes, given: Timed | None = None) -> Timed:
        message = service_pb2.ModelInferRequest.FromString(payload)
        prompt = message.raw_input_contents[0][4:].decode()  # after its length
        shared = 0
        for before in self.prompts:
            same = next(
                (n for n, (x, y) in enumerate(zip(prompt, before, strict=False)) if x != y), len(before)
            )
            shared = max(shared, same)
        self.prompts.append(prompt)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 1, "cached_tokens": shared}
        return Timed(0.0, [1e-3 * (len(prompt) - shared)], [response("answer \ufffd", 1, usage=usage)])


def test_a_conversation_counts_what_its_turns_prefill() -> None:
    numbers = iter(range(100, 200))
    found = asyncio.run(
        generate_probe.conversations(
            FakeStreamer(),  # type: ignore[arg-type]
            "llm",
            ["a" * 100] * 4,
            chat=False,
            repeats=2,
            numbers=lambda: next(numbers),
        )
    )
    assert len(found["turns"]) == 4
    assert found["only_new_prefilled"]
    assert [turn["new"] for turn in found["turns"][1:]] == [108, 108, 108]  # " answer " and the message
    assert [turn["prefilled"] for turn in found["turns"][1:]] == [108, 108, 108]
    assert found["ratio"] < 0.4
    assert found["history_tokens"] == found["turns"][2]["prompt_tokens"]


def test_pauses_count_gaps_that_overlap_the_prompts_window() -> None:
    class Running:
        all = (
            timed(0.0, (0.1, 1), (0.2, 1), (0.9, 1), (1.0, 1)),  # held up from 0.2 to 0.9
            timed(0.0, (0.1, 1), (0.2, 1), (3.0, 1)),  # its next piece came long after
            timed(2.0, (2.5, 1), (9.0, 1)),  # began after it: not held up by it
        )

        async def ready(self) -> None:
            pass

    class Long:
        async def run(self, payload: bytes) -> Timed:
            return timed(0.3, (0.8, 1))

    async def go() -> dict[str, float]:
        return await generate_probe.pauses(
            Long(),  # type: ignore[arg-type]
            iter([b""]),
            repeats=1,
            background=Running(),  # type: ignore[arg-type]
        )

    found = asyncio.run(go())
    assert found["longest_ms"] == pytest.approx(2800)
    assert found["usual_ms"] == pytest.approx(100)
    assert found["prompt_tokens"] == 100


def test_texts_have_the_number_of_tokens_asked_for() -> None:
    costs = {"a": 1, "bb": 2, "ccc": 3}

    def measure(text: str) -> int:
        return 1 + sum(map(len, text.split()))  # one special token

    for tokens in (3, 17, 128):
        for seed in range(5):
            text = generate_worker._text_of(tokens, costs, measure, random.Random(seed))
            assert measure(text) == tokens


def test_the_baseline_generates_and_its_texts_fit(tmp_path: Path) -> None:
    """The worker's jobs on a tiny random Llama, in this process."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, **{word: n + 1 for n, word in enumerate(["10000000", ".", "good", "soup", "cold"])}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    made.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=8, eos_token_id=1, bos_token_id=None, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    wanted = [(7, 2), (20, 1)]
    job = {"kind": "texts", "source": str(tmp_path), "wanted": wanted, "words": ["good soup"]}
    found = generate_worker.run({**job, "before": "10000000. "})["texts"]
    assert [[len(text.split()) for text in texts] for texts in found] == [[5, 5], [18]]
    chat = [{"role": "user", "content": "cold soup"}]
    job = {"kind": "generate", "source": str(tmp_path), "precision": "fp32", "batches": [1, 2], "threads": 1}
    job |= {"prompts": [[chat, ""], [[], "good good soup"]], "new_tokens": 4, "seconds": 0.01, "limit": 60}
    result = generate_worker.run(job)
    assert [*result["points"]] == ["1", "2"]
    assert all(point["tokens_per_s"] > 0 < point["first_token_ms"] for point in result["points"].values())
    assert [*generate_worker.run({**job, "limit": 0})["points"]] == ["1"]  # the limit is over: one is enough


def test_weights_of_a_step_are_those_it_reads_whole(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np

    def tensor(name: str, array: Any) -> Any:
        return onnx.numpy_helper.from_array(array, name)

    node = onnx.helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["x"]),
        node("DequantizeLinear", ["weight", "scale"], ["w"], axis=1),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    initializers = [
        tensor("table", np.zeros((100, 4), np.float32)),
        tensor("weight", np.zeros((4, 8), np.int8)),
        tensor("scale", np.zeros(8, np.float32)),
    ]
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [None])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "g", [ids], [out], initializers)
    for external in (False, True):
        path = tmp_path / f"{external}.onnx"
        model = onnx.helper.make_model(graph)
        onnx.save(model, path, save_as_external_data=external, size_threshold=0)
        assert generate_worker.run({"kind": "weights", "engine": str(path)}) == {"bytes": 32 + 32}
    assert generate_worker.run({"kind": "weights", "engine": "engine.trt"}) == {"bytes": None}


def stream_point(rate: float, first: float) -> StreamPoint:
    return StreamPoint(10, round(rate), 1.0, first, 2 * first, 3.0, 9.0, 30.0, 120.0, 140, 0.01)


def served() -> generate_command.Served:
    closed = {count: stream_point(100.0 * count, 40.0) for count in generate_command.CONCURRENCIES}
    turns = [
        {"prompt_tokens": 100 * n, "new": 100, "prefilled": 90, "first_token_ms": 20.0} for n in range(1, 9)
    ]
    talk = {
        "turns": turns,
        "history_tokens": 700,
        "only_new_prefilled": True,
        "first_token_ms": 20.0,
        "first_token_without_reuse_ms": 80.0,
        "ratio": 0.25,
    }
    pause = {"longest_ms": 180.0, "usual_ms": 9.0, "prompt_tokens": 512.0}
    steady = {1: 200.0, 4: 500.0, 8: 700.0}
    return generate_command.Served(closed, {50: stream_point(9, 41.0)}, steady, 0.04, 0.08, 7, pause, talk)


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    [model] = read_generators(summary(tmp_path))
    folder = tmp_path / "repository" / "llm" / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text("version_policy { specific { versions: 1 } }\n")
    serving = {"layers": 16, "kv_heads": 4, "head_dim": 64}
    manifest = {"engine": {"file": "engine.onnx"}, "target": "onnxruntime", "serving": serving}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = served()
    point_of = {"tokens_per_s": 25.0, "decode_tokens_per_s": 26.0, "first_token_ms": 200.0}
    speeds = {
        "fp32": Speed({"1": point_of, "4": point_of, "8": point_of}, 900.0),
        "bf16": Speed({"1": {**point_of, "tokens_per_s": 50.0}}, 500.0),  # the rest took too long
    }
    given = generate_command.Workload(
        pool=(Prompt(text="x"),), source="evaluation", new_tokens=48, long=(), turns=(), chat=True
    )
    bound = generate_command.bound(model, "int8-weights", 190_000_000, 40e9, found)
    rest = {"served": {"int8-weights": 300.0}, "roofline": {"int8-weights": bound}, "read": 40e9}
    part = generate_command.document(given, speeds, {"int8-weights": found}, rest)
    machine = {"cpu": "A <CPU>", "cores": 2, "memory_gib": 8.0, "system": "Linux", "python": "3.11"}
    machine |= {"tritonserver": "2.51.0", "packages": {}, "busy_before": 0.0}
    return {
        "machine": machine,
        "date": "2026-01-01",
        "command": "client bench",
        "seconds_per_point": 1.0,
        "server_memory_mb": None,
        "models": {"<llm>": part},
    }


def test_the_bound_is_weights_once_a_step_and_each_streams_cache(document: dict[str, Any]) -> None:
    rows = document["models"]["<llm>"]["roofline"]["int8-weights"]["by_streams"]
    # FP32 keys and values of 16 layers, 4 heads of 64, at the prompt and half of the answer.
    cache = (120 + 10 / 2) * 2 * 16 * 4 * 64 * 4
    assert rows["1"]["bytes_per_token"] == round(190e6 + cache)
    assert rows["1"]["bound_tokens_per_s"] == pytest.approx(40e9 / (190e6 + cache), abs=0.1)
    assert rows["1"]["share"] == pytest.approx(200 * (190e6 + cache) / 40e9, abs=1e-3)
    assert rows["8"]["bound_tokens_per_s"] == pytest.approx(8 * 40e9 / (190e6 + 8 * cache), abs=0.1)


def test_ratios_compare_like_with_like(document: dict[str, Any]) -> None:
    assert document["models"]["<llm>"]["ratios"]["int8-weights"] == {
        "tokens_at_1_over_fp32_batch1": 4.0,
        "tokens_at_4_over_fp32_batch4": 16.0,
        "tokens_at_8_over_fp32_batch8": 32.0,
        "first_token_over_fp32": 0.2,
        "tokens_at_1_over_bf16_batch1": 2.0,
        "first_token_over_bf16": 0.2,
        "steady_at_8_over_1": 3.5,
        "first_token_busy_over_idle": 2.0,
        "first_token_reused_over_not": 0.25,
    }


def test_the_table_shows_every_point_and_fact(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    table.print_report(document, Console(width=200))
    out = capsys.readouterr().out
    for wanted in (
        "one by one",
        "batch 8",
        "1 stream",
        "16 streams",
        "open loop, 50%",
        "memory reads 40 GB/s",
        "a step reads 190.0 MB of weights",
        "40.0 ms alone, 80.0 ms beside 7 streams, 2.00x",
        "longest pause of those streams 180 ms while a prompt of 512 tokens",
        "turns 2 to 8 prefilled 630 of 3,500 prompt tokens",
        "300 MiB resident; Transformers fp32 900, bf16 500",
    ):
        assert wanted in out
    assert json.loads(json.dumps(document)) == document


def test_the_page_holds_the_model_and_loads_nothing(document: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    page = render(document)
    assert page.count("<svg") == 1
    assert "&lt;llm&gt;" in page
    assert "4.00x" in page
    assert "<script" not in page
    assert "http" not in page
    assert page.count("<tr") == page.count("</tr>") == 1 + 4 + 4 + 1


def test_options_change_the_plan() -> None:
    base = {"quick": True, "seconds": None, "rates": (), "prompt_tokens": None, "new_tokens": None}
    assert generate_command.make_plan(base) == generate_command.QUICK
    changed = generate_command.make_plan({**base, "quick": False, "prompt_tokens": 128, "rates": (30,)})
    assert (changed.prompt_tokens, changed.rates, changed.new_tokens) == (128, (30,), 48)
