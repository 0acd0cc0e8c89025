"""Summary and evaluation files, the requests made of them, and the figures of merit."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from client import BenchError
from client import metrics as server_metrics
from client.bench import accuracy, machine, metrics, scoring
from client.bench.baseline import Answers
from client.bench.command import fitting, parse_ceilings
from client.bench.summary import BenchModel, Item, read_items, read_summary
from client.bench.workload import Payloads, choose_pool, units
from client.codec import blanks


def entry(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text('{"text": "good", "label": "positive"}\n\n{"text": "bad"}\n', "utf-8")
    base = {
        "task": "classify",
        "source": str(tmp_path),
        "variants": {"int8": "sentiment", "fp16": "sentiment-fp16"},
        "evaluation": str(evaluation),
        "max_length": 128,
    }
    return base | changes


def summary(tmp_path: Path, models: Any) -> Path:
    path = tmp_path / "stack.json"
    path.write_text(json.dumps({"stack": "s", "models": models}), "utf-8")
    return path


def bench_model(task: Any = "classify", **changes: Any) -> BenchModel:
    values: dict[str, Any] = {
        "name": "m",
        "task": task,
        "source": Path(),
        "variants": {"int8": "m"},
        "max_length": 10,
        "overflow": "truncate",
        "labels": None,
        "pooling": None,
        "normalize": True,
        "items": (),
    }
    return BenchModel(**(values | changes))


def test_a_summary_is_read_with_its_evaluation_items(tmp_path: Path) -> None:
    path = summary(tmp_path, {"a": entry(tmp_path), "b": entry(tmp_path)})
    models = read_summary(path)
    assert [model.name for model in models] == ["a", "b"]
    assert models[0].items == (Item("good", "positive"), Item("bad"))
    assert [model.name for model in read_summary(path, ("b",))] == ["b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sing"}, r"models\.a\.task: 'sing' is not one of classify"),
        ({"variants": {}}, r"models\.a\.variants"),
        ({"variants": {"int8": 3}}, r"models\.a\.variants"),
        ({"max_length": "long"}, r"models\.a\.max_length"),
        ({"max_length": True}, r"models\.a\.max_length"),
        ({"source": "/nowhere/at/all"}, "is not a folder"),
        ({"evaluation": None}, "nothing to measure on"),
        ({"evaluation": "/nowhere.jsonl"}, r"/nowhere\.jsonl: cannot be read"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_summary(summary(tmp_path, {"a": entry(tmp_path, **changes)}))


def test_a_missing_field_and_a_model_that_is_no_object_are_named(tmp_path: Path) -> None:
    broken = entry(tmp_path)
    del broken["task"]
    with pytest.raises(BenchError, match=r"models\.a: no task"):
        read_summary(summary(tmp_path, {"a": broken}))
    with pytest.raises(BenchError, match=r"models\.a is not an object"):
        read_summary(summary(tmp_path, {"a": 3}))
    with pytest.raises(BenchError, match="no model zzz; it has a"):
        read_summary(summary(tmp_path, {"a": entry(tmp_path)}), ("zzz",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a stack summary"),
        ('{"models": {}}', "no models"),
        ("\udcff", "not JSON"),
    ],
)
def test_a_file_that_is_no_summary_says_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "stack.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BenchError, match=message):
        read_summary(path)
    with pytest.raises(BenchError, match="no such file"):
        read_summary(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("classify", "{"),
        ("classify", '{"label": "x"}'),
        ("classify", '{"text": ""}'),
        ("classify", "3"),
        ("rerank", '{"query": "q", "passages": [], "relevance": []}'),
        ("rerank", '{"query": "q", "passages": ["a"], "relevance": [1, 2]}'),
        ("rerank", '{"query": "q", "passages": ["a"], "relevance": ["x"]}'),
    ],
)
def test_a_bad_evaluation_line_is_named(tmp_path: Path, task: str, line: str) -> None:
    path = tmp_path / "e.jsonl"
    good = '{"text": "a", "query": "q", "passages": ["a"], "relevance": [1]}'
    path.write_text(f"{good}\n{line}\n", "utf-8")
    with pytest.raises(BenchError, match=r"e\.jsonl, line 2: not a"):
        read_items(path, task)


def texts_of(payload: bytes) -> list[list[bytes]]:
    message = service_pb2.ModelInferRequest.FromString(payload)
    assert message.model_name == "m"
    return [list(deserialize_bytes_tensor(raw)) for raw in message.raw_input_contents]


def test_requests_are_valid_distinct_and_carry_the_text_and_white_space_only() -> None:
    pool = [Item("국물이 좋아요"), Item("fine " * 300)]
    made = list(itertools.islice(Payloads(bench_model(), "m", pool), 1000))
    assert len(set(made)) == 1000
    sent = [texts_of(payload)[0][0].decode() for payload in made]
    assert {text.strip() for text in sent} == {item.text.strip() for item in pool}
    assert len({text.strip() for text in sent[:2]}) == 2  # round and round
    assert all(text.strip() == text.rstrip() for text in sent)


def test_rerank_requests_carry_the_query_and_all_passages() -> None:
    item = Item("query", None, ("one", "two"), (1.0, 0.0))
    query, passages = texts_of(next(Payloads(bench_model("rerank"), "m", [item])))
    assert query == [b"query"]
    assert [passage.strip() for passage in passages] == [b"one", b"two"]
    assert passages[1] != b"two"
    assert units(bench_model("rerank"), [item, Item("q", None, ("a",) * 4, (0.0,) * 4)]) == 3


def test_blanks_differ_for_every_number() -> None:
    tags = {blanks(counter) for counter in (*range(2000), 2**31, 2**32 - 1)}
    assert len(tags) == 2002
    assert all(not value.strip() and len(value) == 32 for value in tags)


def test_the_pool_is_the_same_in_every_run_and_counts_passages() -> None:
    items = [Item(str(number)) for number in range(100)]
    assert choose_pool(items, 10) == choose_pool(items, 10)
    assert len(choose_pool(items, 10)) == 10
    assert sorted(choose_pool(items, 500), key=items.index) == items
    assert len(choose_pool([Item("q", None, ("a",) * 5, (0.0,) * 5)] * 100, 20)) == 4


def test_items_a_model_would_refuse_are_left_out_with_their_answers() -> None:
    items = (Item("q", None, ("a", "b"), (1, 0)), Item("r", None, ("c", "d"), (1, 0)))
    answers = Answers(np.array([0.1, 0.2, 0.3, 0.4]), np.array([5, 11, 5, 5]), ())
    model = bench_model("rerank", items=items, overflow="refuse")
    kept, reduced = fitting(model, answers)
    assert kept == [items[1]]
    assert reduced.values.tolist() == [0.3, 0.4]
    assert len(fitting(bench_model("rerank", items=items), answers)[0]) == 2
    with pytest.raises(BenchError, match="longer than 10 tokens"):
        fitting(model, Answers(answers.values, np.array([99] * 4), ()))


def test_ndcg_against_values_worked_by_hand() -> None:
    assert accuracy.ndcg([1, 0, 0], [3, 2, 1]) == 1
    assert accuracy.ndcg([0, 1], [2, 1]) == pytest.approx(1 / math.log2(3))
    assert accuracy.ndcg([2, 1], [1, 2]) == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert accuracy.ndcg([0, 0], [1, 2]) is None
    # Ties share: the order of the data must not decide.
    assert (
        accuracy.ndcg([1, 0], [5, 5])
        == accuracy.ndcg([0, 1], [5, 5])
        == pytest.approx((1 + 1 / math.log2(3)) / 2)
    )
    relevance = [0.0] * 10 + [1.0]
    assert accuracy.ndcg(relevance, list(range(11, 0, -1))) == 0  # beyond depth 10


def test_spearman_against_known_values() -> None:
    assert accuracy.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert accuracy.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert accuracy.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.948683298)
    assert math.isnan(accuracy.spearman([1, 1], [1, 2]))


def vectors_of(*scores: float) -> Answers:
    return Answers(np.array(scores), np.array([3] * len(scores)), ())


def test_scores_of_each_task() -> None:
    reference = Answers(np.array([1, 0]), np.array([3, 3]), ("negative", "positive"))
    items = [Item("a", "positive"), Item("b", "positive")]
    assert scoring.score(bench_model(), items, reference, ["positive", "positive"]) == {
        "accuracy": 1.0,
        "agreement": 0.5,
    }
    assert scoring.baseline_score(bench_model(), items, reference) == {"accuracy": 0.5}
    vectors = Answers(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([3, 3]), ())
    figures = scoring.score(bench_model("embed"), items, vectors, [[1.0, 0.0], [1.0, 1.0]])
    assert figures == {"mean_cosine": pytest.approx(0.85355, abs=1e-5), "min_cosine": pytest.approx(0.70711)}
    constant = scoring.score(
        bench_model("rerank"), [Item("q", None, ("a", "b"), (0.0, 1.0))], vectors_of(0.5, 0.5), [0.1, 0.2]
    )
    assert constant["spearman"] is None  # undefined, and JSON has no NaN
    groups = [Item("q", None, ("a", "b"), (0.0, 1.0))]
    scores = Answers(np.array([0.1, 0.9]), np.array([3, 3]), ())
    assert scoring.score(bench_model("rerank"), groups, scores, [0.2, 0.3]) == {
        "ndcg10": 1.0,
        "spearman": 1.0,
    }


def test_padding_is_the_share_of_positions_without_a_token() -> None:
    assert scoring.padding([4, 4, 4], 2) == 0
    assert scoring.padding([1, 3], 2) == pytest.approx(1 / 3)


def test_ceilings_name_what_is_measured() -> None:
    models = [bench_model()]
    assert parse_ceilings(["m:int8=900"], models) == {("m", "int8"): 900.0}
    for wrong in ("m:int8", "m:fp16=3", "x:int8=3", "m:int8=-1", "m:int8=nan", "m:int8=inf", "=1"):
        with pytest.raises(BenchError, match="--ceiling"):
            parse_ceilings([wrong], models)


def write_process(proc: Path, pid: int, parent: int, *command: str) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "stat").write_text(f"{pid} (odd ) name) S {parent} 0 0")
    (folder / "status").write_text(f"Name:\tx\nVmRSS:\t{pid * 1024} kB\n")
    (folder / "cmdline").write_bytes("\0".join(command).encode() + b"\0")


def test_memory_counts_the_whole_tree_and_finds_a_models_own_process(tmp_path: Path) -> None:
    write_process(tmp_path, 10, 1, "tritonserver")
    write_process(tmp_path, 20, 10, "stub", "/repo/sentiment/1/model.py")
    write_process(tmp_path, 21, 10, "stub", "/repo/sentiment-fp16/1/model.py")
    write_process(tmp_path, 30, 20, "helper")
    write_process(tmp_path, 40, 1, "other", "/repo/sentiment/1/model.py")
    tree = machine.process_tree(10, tmp_path)
    assert sorted(tree) == [10, 20, 21, 30]
    assert machine.tree_resident_mib(tree, tmp_path) == 81
    assert machine.model_pids(tree, "sentiment", tmp_path) == [20]
    assert machine.resident_mib(99, tmp_path) is None


def test_padding_counters_are_read_per_model_and_as_a_difference() -> None:
    text = (
        "# HELP onecard_tokens_total Tokens\n"
        'onecard_tokens_total{model="a"} 90\nonecard_padding_total{model="a"} 10\n'
        'onecard_tokens_total{model="a-fp16",version="1"} 1e3\nnv_inference_count{model="a"} 5\n'
    )
    scrape = server_metrics.parse(text)
    assert scrape.total("a-fp16", "onecard_tokens_total") == 1000
    assert metrics.padding_share("a", server_metrics.parse(""), scrape) == 0.1
    before = server_metrics.parse('onecard_tokens_total{model="a"} 50\nonecard_padding_total{model="a"} 10\n')
    assert metrics.padding_share("a", before, scrape) == 0
    assert metrics.padding_share("a", scrape, scrape) is None
    assert metrics.read("127.0.0.1:1").error


def test_a_reading_is_settled_when_it_has_counted_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(requests: int) -> server_metrics.Scrape:
        return server_metrics.parse(f'onecard_requests_total{{model="a",outcome="completed"}} {requests}\n')

    late = iter([counted(11), counted(14), counted(15), counted(99)])
    monkeypatch.setattr(metrics, "read", lambda: next(late))
    assert metrics.settled("a", 5, counted(10)) == counted(15)
    monkeypatch.setattr(metrics, "read", lambda: counted(14))
    assert metrics.settled("a", 5, counted(10), limit=0.2) == counted(14)
    nothing = server_metrics.parse("")
    monkeypatch.setattr(metrics, "read", lambda: nothing)
    assert metrics.settled("a", 5, counted(10)) is nothing


def test_busy_share_is_read_from_the_kernels_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 700 100 0 0 0\ncpu0 1 2 3 4 5\n")
    later = "cpu  160 0 100 720 120 0 0 0\n"
    monkeypatch.setattr("client.bench.machine.time.sleep", lambda seconds: stat.write_text(later))
    assert machine.busy_share(1, stat) == pytest.approx(0.6)
    assert machine.busy_share(1, tmp_path / "absent") is None
