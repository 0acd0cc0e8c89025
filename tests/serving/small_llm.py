"""A tiny Llama with random weights, and calls to it as any client would make them."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferInput, InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

from triton_repo.generators import INPUTS

VOCABULARY, POSITIONS = 420, 8192
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["국수가 정말 맛있어요", "the noodles were good", "배송이 느려요 👩‍🍳", "  spaces  and\nlines "]


def write_llm(folder: Path, *, seed: int) -> Path:
    """A Hugging Face folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json."""
    from llama_checkpoint import Llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    random = np.random.default_rng(seed)

    def weight(name: str, shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return random.normal(0, 1.0 if "embed" in name else 0.3, shape).astype(np.float32)

    Llama(vocabulary=VOCABULARY, positions=POSITIONS).write(
        folder,
        weight,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        hidden_act="silu",
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def build_llm(checkpoint: Path, folder: Path, *, model: str) -> Path:
    """Leave the FP32 graph as a finished engine folder for the CPU, as the build does."""
    import onnx

    from build_engines.export.decoder import open_decoder, write_decoder
    from build_engines.export.decoder_serving import copy_chat_tokenizer, decoder_serving
    from build_engines.manifest import write_manifest
    from build_engines.targets.decoder_lowering import lower_decoder, widen_decoder

    folder.mkdir(parents=True)
    decoder = open_decoder(checkpoint)
    write_decoder(decoder, folder / "model.onnx", precision="fp32")
    typed = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    onnx.save(lower_decoder(widen_decoder(typed, folder), {}), str(folder / "engine.onnx"))
    (folder / "model.onnx").unlink()
    copy_chat_tokenizer(checkpoint, folder)
    bounds = {"slots": 4, "capacity": POSITIONS, "chunk": 64}
    facts = {"model": model, "task": "generate", "precision": "fp32", "target": "onnxruntime"}
    write_manifest(
        folder, {**facts, "serving": {**decoder_serving(decoder, "fp32"), **bounds}}, "engine.onnx"
    )
    return folder


class Silent:
    """A build that nobody watches."""

    def start(self, model: str, stage: str) -> None: ...
    def progress(self, phase: str, done: int, total: int) -> None: ...
    def finish(self, run: Any, detail: str) -> None: ...


def thrice(test: Callable[..., None]) -> Callable[..., None]:
    """Try a test of cancellation up to three times.

    Triton 2.51 loses a cancellation that meets a response on its way. At the speed of these tiny models that
    happens to one in a hundred, and to one in ten beside other work; three in a row are a fault of ours.
    """

    @functools.wraps(test)
    def tried(*arguments: Any, **named: Any) -> None:
        for _ in range(2):
            with contextlib.suppress(AssertionError):
                test(*arguments, **named)
                return
        test(*arguments, **named)

    return tried


class Refused(Exception):
    """The server's error message."""


class Talk:
    """Calls over gRPC: `stream` yields each response's outputs, `whole` the only one of a request without."""

    def __init__(self, address: str, model: str = "talk") -> None:
        self.model = model
        self._channel = grpc.insecure_channel(address)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def call(self, *, request_id: str = "", parameters: dict[str, int] | None = None, **inputs: Any) -> Any:
        """The gRPC call itself: iterate over it, or `cancel` it."""
        message = service_pb2.ModelInferRequest(model_name=self.model, id=request_id)
        for name, value in (parameters or {}).items():
            message.parameters[name].int64_param = value
        for name, value in inputs.items():
            made = tensor(name, value)
            message.inputs.append(made._get_tensor())
            message.raw_input_contents.append(made._get_content())
        return self._stub.ModelStreamInfer(iter([message]), timeout=60)

    def stream(self, **inputs: Any) -> Iterator[dict[str, Any]]:
        """Read to the end also behind a failure: a call that is dropped there is a call cancelled."""
        failure = None
        for response in self.call(**inputs):
            try:
                yield outputs(response)
            except Refused as error:
                failure = error
        if failure:
            raise failure

    def whole(self, **inputs: Any) -> dict[str, Any]:
        (answer,) = self.stream(stream=False, **inputs)
        return answer

    def text(self, **inputs: Any) -> str:
        """The one sample of a stream, joined."""
        return "".join(answer["text"][0] for answer in self.stream(**inputs))

    def error(self, **inputs: Any) -> str:
        """The message of a request that fails; Triton's streams carry no code beside it."""
        try:
            for _ in self.stream(**inputs):
                pass
        except Refused as error:
            return str(error)
        raise AssertionError("the request was answered")


def tensor(name: str, value: Any) -> InferInput:
    kinds = {spec.name: "BYTES" if spec.data_type == "STRING" else spec.data_type for spec in INPUTS}
    kind = kinds.get(name, "INT32")
    if name == "messages" and not isinstance(value, bytes):
        value = json.dumps(value, ensure_ascii=False)
    values = value if isinstance(value, list) else [value]
    if kind == "BYTES":
        values = [entry.encode() if isinstance(entry, str) else entry for entry in values]
    array = np.array(values, dtype=object if kind == "BYTES" else triton_to_np_dtype(kind))
    made = InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def outputs(response: Any) -> dict[str, Any]:
    """A response's tensors as lists of Python values; the usage as an object, None while there is none."""
    if response.error_message:
        raise Refused(response.error_message)
    result = InferResult(response.infer_response)
    found = {output.name: result.as_numpy(output.name).tolist() for output in response.infer_response.outputs}
    for name in ("text", "finish_reason", "usage"):
        found[name] = [value.decode() for value in found[name]]
    found["usage"] = json.loads(found["usage"][0] or "null")
    return found


def post(address: str, path: str, body: Any) -> tuple[int, str]:
    """Status and body of a POST of JSON."""
    request = urllib.request.Request(f"http://{address}{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(address: str, model: str) -> dict[str, float]:
    """onecard_* of a model but its histograms, without that prefix or onecard_llm_; with the outcome or the
    reason behind the name where there is one."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("onecard_") and f'model="{model}"' in line and "_seconds_" not in line:
            labels, _, value = line.rpartition(" ")
            name, _, rest = labels.removeprefix("onecard_").removeprefix("llm_").partition("{")
            own = re.search(r'(?:outcome|reason)="([^"]*)"', rest)
            found[f"{name} {own[1] if own else ''}".strip()] = float(value)
    return found


def quiet(address: str, model: str) -> dict[str, float]:
    """The metrics once nothing runs; they are up to a second old."""
    deadline, since = time.monotonic() + 20, time.monotonic()
    found = metrics(address, model)
    while "slots_active" not in found or time.monotonic() - since < 1.3:
        assert time.monotonic() < deadline, f"still busy: {found}"
        time.sleep(0.1)
        last, found = found, metrics(address, model)
        # The rate is an average over some seconds, which go by without a request too.
        if any(
            last[name] != found[name]
            for name in last.keys() - {"tokens_per_second", "resident_bytes", "reported_timestamp_seconds"}
        ):
            since = time.monotonic()
        if found.get("slots_active") or found.get("queue_requests"):
            since = time.monotonic()
    return found
