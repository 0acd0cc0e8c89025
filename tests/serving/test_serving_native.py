"""The native layout in a real tritonserver: what it loads, and that it answers as the Python models do.

Triton's TensorRT backend is not here. The engine of each ensemble is replaced by a Python model that runs the
same graph in ONNX Runtime; everything else is the repository as `triton-repo write --native` leaves it.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from click.testing import CliRunner
from small_models import WORDS, Served
from tritonclient.utils import InferenceServerException

from build_engines.errors import ServerError
from build_engines.stack import load_stack
from client import Client
from client.cli import main
from triton_repo.config_pbtxt import parse, render
from triton_repo.runtime.session import manifest_digest, sha256
from triton_repo.runtime.steps import widths
from triton_repo.server import Server, ServerOptions
from triton_repo.server_log import loaded
from triton_repo.writer import write_repository

pytestmark = pytest.mark.serving

STACK = """
name = "native"
card = "rtx-5070-ti"
targets = ["tensorrt"]

[models.label]
task = "classify"
source = "./label"
precisions = ["fp16"]
max_length = 64
evaluation = "texts.jsonl"

[models.vector]
task = "embed"
source = "./vector"
precisions = ["fp16"]
max_length = 64
cache = true
evaluation = "texts.jsonl"

[models.order]
task = "rerank"
source = "./order"
precisions = ["fp16"]
max_length = 64
evaluation = "groups.jsonl"

[models.strict]
task = "embed"
source = "./vector"
precisions = ["fp16"]
max_length = 64
overflow = "refuse"
evaluation = "texts.jsonl"
"""
MODELS = ("label", "vector", "order", "strict")
STAND_IN = Path(__file__).parent / "engine_stand_in.py"
LONG = "the noodles " * 8334
TEXTS = [
    "good",
    "the noodles were very good",
    "bad " * 12,
    "never again, this place " * 4,
    "맛있어요",
    "review " * 50,
    "cold",
    "the price was good. the place was bad",
]


def as_tensorrt(engine: Path, folder: Path, model: str) -> None:
    """A finished engine folder of the target tensorrt, whose engine file is the ONNX graph."""
    shutil.copytree(engine, folder)
    (folder / "engine.onnx").rename(folder / "engine.trt")
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "engine.trt"
    manifest |= {"model": model, "target": "tensorrt", "precision": "fp16"}
    manifest["engine"] = {"file": "engine.trt", "bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def written(built: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, engines = built
    folder = tmp_path_factory.mktemp("native")
    (folder / "native.toml").write_text(STACK)
    for name in ("texts.jsonl", "groups.jsonl"):
        shutil.copyfile(source / name, folder / name)
    for model in MODELS:
        as_tensorrt(engines[model], folder / "engines" / model / "fp16" / "tensorrt", model)
    stack = load_stack(folder / "native.toml", build_dir=folder)
    return write_repository(stack, folder / "engines", folder / "repository", target="tensorrt", native=True)


def put_stand_in(engine: Path) -> None:
    message = parse((engine / "config.pbtxt").read_text())
    message.platform, message.backend, message.default_model_filename = "", "python", ""
    message.ClearField("optimization")
    group = message.instance_group[0]
    group.ClearField("profile")
    group.ClearField("gpus")
    group.kind = group.KIND_CPU
    (engine / "config.pbtxt").write_text(render(message))
    shutil.copyfile(STAND_IN, engine / "1" / "model.py")


@pytest.fixture(scope="module")
def native(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("stand-in") / "repository"
    shutil.copytree(written, repository)
    for engine in repository.glob("*_engine"):
        put_stand_in(engine)
    with Server(repository, ServerOptions(free_ports=True)) as server:
        yield server


@pytest.fixture(scope="module")
def grpc(native: Server) -> Any:
    return grpc_client.InferenceServerClient(native.urls["grpc"])


@pytest.fixture(scope="module")
def ordinary(served: Served) -> Any:
    return grpc_client.InferenceServerClient(served.grpc)


def ask(client: Any, model: str, **inputs: Any) -> dict[str, Any]:
    tensors = []
    for name, values in inputs.items():
        encode = np.vectorize(lambda text: text.encode() if isinstance(text, str) else text, otypes=[object])
        array = encode(np.array(values, dtype=object))
        tensors.append(grpc_client.InferInput(name, list(array.shape), "BYTES"))
        tensors[-1].set_data_from_numpy(array)
    answer = client.infer(model, tensors)
    return {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
        if value.dtype == np.float32:
            np.testing.assert_allclose(ours[name], value, atol=2e-5)
        else:
            assert ours[name].tolist() == value.tolist()


def runs(native: Server, model: str) -> list[list[int]]:
    log = native.repository / f"{model}_engine" / "1" / "runs.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one text classified": ("label", {"text": [["the noodles were very good"]]}),
    "texts classified": ("label", {"text": [[text] for text in TEXTS]}),
    "a long text classified": ("label", {"text": [["good"], [LONG]]}),
    "one text embedded": ("vector", {"text": [["맛있어요"]]}),
    "texts embedded": ("vector", {"text": [[text] for text in TEXTS]}),
    "64 texts embedded": (
        "vector",
        {"text": [[word * (1 + place % 7)] for place in range(64) for word in ["bad "]]},
    ),
    "one pair ranked": ("order", {"query": [["noodles"]], "passages": [["the noodles were good"]]}),
    "passages ranked": ("order", {"query": [["noodles"]], "passages": [TEXTS]}),
    "queries ranked": ("order", {"query": [["noodles"], ["price"]], "passages": [TEXTS[:3], TEXTS[3:6]]}),
    "a long passage ranked": ("order", {"query": [["noodles"]], "passages": [["good", LONG]]}),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_an_ensemble_answers_as_the_python_model_does(grpc: Any, ordinary: Any, case: str) -> None:
    model, inputs = REQUESTS[case]
    same(ask(grpc, model, **inputs), ask(ordinary, model, **inputs))


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "empty": ("label", {"text": [[""]]}, "'text' is empty"),
    "blank": ("vector", {"text": [["good"], [" "]]}, "'text' 1 is blank"),
    "utf-8": ("vector", {"text": [[b"caf\xe9 "]]}, "'text' is not valid UTF-8 (byte 0xe9 at 3"),
    "refused": ("strict", {"text": [[LONG]]}, "has more than 64 tokens"),
    "batch": ("vector", {"text": [["a"]] * 65}, "must be <= 64"),
    "passage": ("order", {"query": [["a"]], "passages": [["b", ""]]}, "'passages' 1 is empty"),
    "pairs": ("order", {"query": [["a"], ["b"]], "passages": [["c"] * 33] * 2}, "at most 64 in one request"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_the_same_precise_error(grpc: Any, case: str) -> None:
    model, inputs, message = BAD[case]
    with pytest.raises(InferenceServerException) as caught:
        ask(grpc, model, **inputs)
    assert message in str(caught.value)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert grpc.is_server_ready()


def test_requests_of_one_width_share_runs_and_bad_ones_fail_alone(
    grpc: Any, ordinary: Any, native: Server
) -> None:
    wanted = {text: ask(ordinary, "label", text=[[text]]) for text in ("good", "bad cold", "the noodles")}
    texts = list(wanted)
    before = len(runs(native, "label"))

    def one(index: int) -> bool:
        if index % 6 == 5:
            with pytest.raises(InferenceServerException, match="is empty"):
                ask(grpc, "label", text=[[""]])
            return False
        text = texts[index % 3]
        same(ask(grpc, "label", text=[[text]]), wanted[text])
        return True

    with ThreadPoolExecutor(16) as pool:
        answered = sum(pool.map(one, range(360)))
    found = runs(native, "label")[before:]
    assert sum(rows for rows, _ in found) == answered == 300
    assert len(found) < answered, "no requests were batched together"
    assert {width for _, width in found} == {16}


def test_rankings_share_runs_and_keep_their_shapes(grpc: Any, ordinary: Any) -> None:
    cases = [
        {"query": [[WORDS[size]]], "passages": [[f"{word} {WORDS[size]}" for word in WORDS[:size]]]}
        for size in (1, 2, 3, 5, 9)
    ]
    wanted = [ask(ordinary, "order", **case) for case in cases]
    with ThreadPoolExecutor(12) as pool:
        done = list(pool.map(lambda n: same(ask(grpc, "order", **cases[n % 5]), wanted[n % 5]), range(60)))
    assert len(done) == 60


def test_every_run_has_one_of_the_few_widths(grpc: Any, native: Server) -> None:
    ask(grpc, "vector", text=[[text] for text in TEXTS])
    ask(grpc, "vector", text=[["the noodles were very good review " * 3]])
    found = runs(native, "vector")
    assert {width for _, width in found} <= set(widths(64)) == {16, 32, 64}
    assert [1, 32] in found
    # The warm-up: the largest batch at its largest width, before anybody asked.
    assert found[0] == [64, 64]


def test_a_repeated_request_comes_from_the_cache(grpc: Any, native: Server) -> None:
    first = ask(grpc, "vector", text=[["the same noodles again"]])
    count = len(runs(native, "vector"))
    same(ask(grpc, "vector", text=[["the same noodles again"]]), first)
    assert len(runs(native, "vector")) == count


def test_our_client_finds_the_ensembles_alone(native: Server) -> None:
    with Client(native.urls["grpc"]) as client:
        assert client.classify("the noodles were very good").label
        ranked = client.rerank("noodles", ["good"] * 150)
        assert len(ranked) == 150
    shown = CliRunner().invoke(main, ["status", "--url", native.urls["grpc"], "--json"])
    assert shown.exit_code == 0, shown.output
    models = {model["name"]: model for model in json.loads(shown.stdout)["models"]}
    assert {name for name, model in models.items() if model["task"]} == set(MODELS)


def test_truncation_is_counted_under_the_ensembles_name(grpc: Any, native: Server) -> None:
    def counted() -> float:
        with urllib.request.urlopen(f"http://{native.urls['metrics']}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith('onecard_truncated_total{model="order"')]
        return float(found[0].split()[-1])

    before = counted()
    ask(grpc, "order", query=[["good"]], passages=[[LONG, "good"]])
    deadline = time.monotonic() + 5
    while counted() == before and time.monotonic() < deadline:
        time.sleep(0.2)
        ask(grpc, "order", query=[["good"]], passages=[["good"]])
    assert counted() >= before + 1


def test_the_repository_as_written_lacks_nothing_but_the_backend(written: Path) -> None:
    server = Server(written, ServerOptions(free_ports=True))
    with pytest.raises(ServerError) as caught:
        server.start()
    reasons = [line.strip() for line in str(caught.value).splitlines() if ": " in line][:4]
    assert {reason.split(":")[0] for reason in reasons} == {f"{name}_engine" for name in MODELS}
    assert all("this tritonserver has no TensorRT backend" in reason for reason in reasons)
    ready = loaded(server.log.read_text())
    assert ready == {f"{name}_tokenize" for name in MODELS} | {"label_answer", "order_answer"}


def test_a_step_with_another_tokenizer_is_refused(written: Path, tmp_path: Path) -> None:
    for part in ("strict_tokenize", "label_answer"):
        shutil.copytree(written / part, tmp_path / "repository" / part)
    tokenizer = tmp_path / "repository" / "strict_tokenize" / "1" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"noodles", b"noodlez"))
    manifest = tmp_path / "repository" / "label_answer" / "1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("negative", "positive"))
    with pytest.raises(ServerError, match=r"tokenizer\.json: altered") as caught:
        Server(tmp_path / "repository", ServerOptions(free_ports=True)).start()
    assert "manifest was altered" in str(caught.value)
