"""export_encoder on whole folders: layouts, heads, refusals by name, files that are whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import batch, save_tiny, session, write_word_tokenizer

from build_engines.errors import ArtifactError, ExportError
from build_engines.export import export_encoder
from build_engines.graphs import read_graph, save_graph, verify_graph

SHAPE = (3, 17)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier and an embedder of the BERT family; tests copy them before they change anything."""
    folders = {}
    for task in ("classify", "embed", "rerank"):
        folders[task] = tmp_path_factory.mktemp(task)
        save_tiny(folders[task], "bert", task)
    return folders


def copy(folder: Path, tmp_path: Path, **settings: Any) -> Path:
    """A copy of the checkpoint with changed config.json settings (None removes one)."""
    target = tmp_path / "checkpoint"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config.update(settings)
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def rewrite(folder: Path, change: Any) -> None:
    """Pass the folder's tensors through `change` and save them again."""
    from safetensors.torch import load_file, save_file

    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def run(path: Path, arrays: dict[str, Any] | None = None) -> list[Any]:
    return session(path).run(None, arrays or batch(SHAPE, 0, False))


def prefixed(tensors: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}


# What the graph promises to the stages after it


def test_names_and_interface_are_those_documented(saved: dict[str, Path], tmp_path: Path) -> None:
    graph = export_encoder(saved["rerank"], "rerank", tmp_path)
    model = read_graph(graph.path)
    nodes = {node.name: node for node in model.graph.node}
    initializers = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for name, shape in {
        "layers.0.attention.qkv": (32, 96),
        "layers.2.attention.output": (32, 32),
        "layers.1.ffn.up": (32, 56),
        "layers.1.ffn.down": (56, 32),
        "pooler": (32, 32),
        "head.output": (32, 1),
    }.items():
        assert nodes[name].op_type == "MatMul"
        assert nodes[name].input[1] == f"{name}.weight"
        assert initializers[f"{name}.weight"] == shape
        assert nodes[f"{name}.bias"].op_type == "Add"
        assert list(nodes[f"{name}.bias"].input) == [f"{name}.matmul", f"{name}.bias_value"]
        assert initializers[f"{name}.bias_value"] == shape[1:]
    assert {nodes[f"layers.{i}.{norm}.norm"].op_type for i in range(3) for norm in ("attention", "ffn")} == {
        "LayerNormalization"
    }
    assert nodes["layers.0.ffn.act"].op_type == "Gelu"
    assert nodes["layers.0.attention.core"].op_type == "Attention"
    assert graph.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert graph.outputs == ("scores", "logits")
    dims = [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "sequence"]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]


def test_serving_facts(saved: dict[str, Path], tmp_path: Path) -> None:
    source = copy(saved["classify"], tmp_path, id2label={"2": "mixed", "0": "bad", "1": "good"})
    serving = export_encoder(source, "classify", tmp_path / "a").serving
    assert serving["labels"] == ["bad", "good", "mixed"]
    assert (serving["dimension"], serving["max_positions"], serving["multi_label"]) == (None, 200, False)
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    embed = export_encoder(saved["embed"], "embed", tmp_path / "b").serving
    assert (embed["labels"], embed["dimension"]) == (None, 32)


def test_roberta_positions_start_after_the_padding_index(tmp_path: Path) -> None:
    save_tiny(tmp_path, "roberta", "embed")
    assert export_encoder(tmp_path, "embed", tmp_path / "out").serving["max_positions"] == 200 - 2


# Heads


def test_multi_label_probabilities_are_independent(saved: dict[str, Path], tmp_path: Path) -> None:
    source = copy(saved["classify"], tmp_path, problem_type="multi_label_classification")
    graph = export_encoder(source, "classify", tmp_path / "out")
    logits, probabilities = run(graph.path)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert graph.serving["multi_label"] is True


def test_a_two_class_reranker_scores_its_second_class(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "bert", "rerank", num_labels=2)
    assert model.config.num_labels == 2
    arrays = batch(SHAPE, 0, True)
    scores, logits = run(export_encoder(tmp_path, "rerank", tmp_path / "out").path, arrays)
    exp = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(scores, (exp / exp.sum(1, keepdims=True))[:, 1], atol=1e-6)


def test_embedding_without_normalization_keeps_its_length(saved: dict[str, Path], tmp_path: Path) -> None:
    raw = run(export_encoder(saved["embed"], "embed", tmp_path / "raw", normalize=False).path)[0]
    unit = run(export_encoder(saved["embed"], "embed", tmp_path / "unit").path)[0]
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)


@pytest.mark.parametrize(("pooling", "spelling"), [("cls", "new"), ("mean", "old")])
def test_sentence_transformers_folder(pooling: str, spelling: str, tmp_path: Path) -> None:
    """Pooling, Dense and Normalize against sentence-transformers itself, in today's and the old layout."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    save_tiny(tmp_path / "plain", "distilbert", "embed")
    (tmp_path / "plain" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "w0", "unk_token": "w1"})
    )
    torch.manual_seed(1)
    dense = Dense(32, 20, activation_function=torch.nn.Tanh())
    parts = [Transformer(str(tmp_path / "plain")), Pooling(32, pooling_mode=pooling), dense, Normalize()]
    model = SentenceTransformer(modules=parts, device="cpu").eval()
    folder = tmp_path / "saved"
    model.save(str(folder))
    if spelling == "old":
        use_the_old_layout(folder, pooling)
    arrays = batch(SHAPE, 0, False)
    with torch.no_grad():
        features = model({name: torch.from_numpy(array) for name, array in arrays.items()})
    graph = export_encoder(folder, "embed", tmp_path / "out")
    found = run(graph.path, arrays)[0]
    assert graph.serving["dimension"] == 20
    np.testing.assert_allclose(found, features["sentence_embedding"].numpy(), atol=1e-5)


def use_the_old_layout(folder: Path, pooling: str) -> None:
    """Move the encoder to 0_Transformer and spell the pooling with one flag per mode."""
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
    modules[1]["type"] = "sentence_transformers.models.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "0_Transformer").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(folder / "0_Transformer" / path.name)
    flags = {"word_embedding_dimension": 32, "pooling_mode_cls_token": pooling == "cls",
             "pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_max_tokens": False}  # fmt: skip
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))


def sentence_folder(source: Path, target: Path, pooling: dict[str, Any], *types: str) -> Path:
    shutil.copytree(source, target)
    kinds = ("Transformer", "Pooling", *types)
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (target / "modules.json").write_text(json.dumps(modules))
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return target


def test_pooling_is_refused_by_name_and_can_be_overridden(saved: dict[str, Path], tmp_path: Path) -> None:
    source = sentence_folder(saved["embed"], tmp_path / "s", {"pooling_mode_max_tokens": True})
    with pytest.raises(ExportError, match="pooling max is not supported; supported are mean and cls"):
        export_encoder(source, "embed", tmp_path / "out")
    export_encoder(source, "embed", tmp_path / "out", pooling="cls")


def test_an_unknown_sentence_module_is_refused_by_name(saved: dict[str, Path], tmp_path: Path) -> None:
    source = sentence_folder(saved["embed"], tmp_path / "s", {"pooling_mode": "mean"}, "LSTM")
    with pytest.raises(ExportError, match="LSTM is not supported"):
        export_encoder(source, "embed", tmp_path / "out")


def test_a_default_prompt_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    source = copy(saved["embed"], tmp_path)
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (source / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ExportError, match="default prompt 'query: '"):
        export_encoder(source, "embed", tmp_path / "out")


# Checkpoints as they are found


@pytest.mark.parametrize("prefix", ["", "bert.", "model."])
def test_tensor_names_may_carry_any_prefix(prefix: str, saved: dict[str, Path], tmp_path: Path) -> None:
    expected = run(export_encoder(saved["embed"], "embed", tmp_path / "a").path)[0]
    source = copy(saved["embed"], tmp_path)
    rewrite(source, lambda tensors: prefixed(tensors, "", prefix))
    np.testing.assert_array_equal(run(export_encoder(source, "embed", tmp_path / "b").path)[0], expected)


def test_an_embedder_may_come_from_a_classifier(saved: dict[str, Path], tmp_path: Path) -> None:
    export_encoder(saved["classify"], "embed", tmp_path)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_float_types_are_widened(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    import torch

    dtype = getattr(torch, kind)
    stored = copy(saved["classify"], tmp_path)
    rewrite(stored, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    rounded = tmp_path / "rounded"
    shutil.copytree(saved["classify"], rounded)
    rewrite(rounded, lambda tensors: {name: t.to(dtype).float() for name, t in tensors.items()})
    found = run(export_encoder(stored, "classify", tmp_path / "a").path)[0]
    np.testing.assert_array_equal(found, run(export_encoder(rounded, "classify", tmp_path / "b").path)[0])


def test_shards_equal_one_file(saved: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    source = copy(saved["classify"], tmp_path)
    (source / "model.safetensors").unlink()
    model = AutoModelForSequenceClassification.from_pretrained(saved["classify"])
    model.save_pretrained(source, max_shard_size="20KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    expected = run(export_encoder(saved["classify"], "classify", tmp_path / "a").path)[0]
    np.testing.assert_array_equal(run(export_encoder(source, "classify", tmp_path / "b").path)[0], expected)
    shards[1].unlink()
    with pytest.raises(ExportError, match=f"{shards[1].name} is named by .* but does not exist"):
        export_encoder(source, "classify", tmp_path / "c")


def test_norms_from_tensorflow_and_saved_buffers_are_understood(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    def as_of_2019(tensors: dict[str, Any]) -> dict[str, Any]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in old.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        head = {"cls.predictions.bias": torch.zeros(99), "cls.seq_relationship.weight": torch.zeros(2, 32)}
        return {**tensors, **head, "embeddings.position_ids": torch.arange(200)}

    expected = run(export_encoder(saved["embed"], "embed", tmp_path / "a").path)[0]
    source = copy(saved["embed"], tmp_path)
    rewrite(source, as_of_2019)
    np.testing.assert_array_equal(run(export_encoder(source, "embed", tmp_path / "b").path)[0], expected)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "deberta-v2"}, "'deberta-v2' is not supported; supported are bert, roberta"),
        ({"hidden_act": "mish"}, "hidden activation 'mish' is not supported; supported are gelu"),
        (
            {"position_embedding_type": "relative_key"},
            "'relative_key' is not supported; supported is 'absolute'",
        ),
        ({"is_decoder": True}, "decoder models are not supported"),
        ({"add_cross_attention": True}, "cross attention are not supported"),
        ({"num_hidden_layers": 4}, r"lack encoder\.layer\.3|lack bert\.encoder\.layer\.3"),
        ({"num_hidden_layers": 2}, r"would leave out the tensors .*encoder\.layer\.2"),
        ({"intermediate_size": 64}, r"has shape \[56, 32\], config.json implies \[64, 32\]"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
        ({"hidden_size": "32"}, "hidden_size must be an integer from 1 to 2147483647, not '32'"),
        ({"problem_type": "regression"}, "predict numbers, not classes"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label names 2 labels, the head has 3 outputs"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification has no sequence"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints"),
    ],
)
def test_what_the_graph_cannot_hold_is_refused_by_name(
    settings: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    source = copy(saved["classify"], tmp_path, **settings)
    with pytest.raises(ExportError, match=message):
        export_encoder(source, "classify", tmp_path / "out")
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_missing_head_names_the_tensor_and_the_architecture(saved: dict[str, Path], tmp_path: Path) -> None:
    source = copy(saved["embed"], tmp_path, architectures=None)
    with pytest.raises(ExportError, match=r"lack classifier\.weight"):
        export_encoder(source, "classify", tmp_path / "out")


def test_a_tensor_nobody_reads_is_an_error(saved: dict[str, Path], tmp_path: Path) -> None:
    import torch

    source = copy(saved["classify"], tmp_path)
    rewrite(source, lambda tensors: {**tensors, "bert.adapter.weight": torch.ones(2)})
    with pytest.raises(ExportError, match=r"would leave out the tensors bert\.adapter\.weight"):
        export_encoder(source, "classify", tmp_path / "out")


def test_three_labels_are_no_reranker(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="one or two outputs, this head has 3"):
        export_encoder(saved["classify"], "rerank", tmp_path)


def test_pickled_weights_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    source = copy(saved["classify"], tmp_path)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"pickled weights \(pytorch_model.bin\)"):
        export_encoder(source, "classify", tmp_path / "out")


@pytest.mark.parametrize("kept", [4, 100, 0.5, 0.999])
def test_truncated_weights_are_refused(kept: float, saved: dict[str, Path], tmp_path: Path) -> None:
    source = copy(saved["classify"], tmp_path)
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    with pytest.raises(ExportError, match=r"model\.safetensors is damaged"):
        export_encoder(source, "classify", tmp_path / "out")


def test_quantized_tensors_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    import torch

    source = copy(saved["classify"], tmp_path)
    rewrite(source, lambda tensors: {name: t.to(torch.int8) for name, t in tensors.items()})
    with pytest.raises(ExportError, match="stored as I8, not as floats"):
        export_encoder(source, "classify", tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    source = copy(saved["classify"], tmp_path)
    write_word_tokenizer(source, words=120)
    with pytest.raises(ExportError, match="ids up to 119, the embedding table has 99 rows"):
        export_encoder(source, "classify", tmp_path / "out")


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        export_encoder(tmp_path / "nowhere", "embed", tmp_path / "out")


# Tokenizer


def test_a_slow_tokenizer_becomes_tokenizer_json(saved: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = copy(saved["embed"], tmp_path)
    (source / "tokenizer.json").unlink()
    (source / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"])
    )
    export_encoder(source, "embed", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("good Bad").tokens == ["[CLS]", "good", "bad", "[SEP]"]


def test_the_tokenizer_is_the_one_that_transformers_sets_up(saved: dict[str, Path], tmp_path: Path) -> None:
    """tokenizer_config.json overrules tokenizer.json in transformers, so it must here."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, BertTokenizerFast

    source = copy(saved["embed"], tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "Good"]))
    BertTokenizerFast(str(vocabulary), do_lower_case=True).save_pretrained(source)
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_lower_case": False}))
    export_encoder(source, "embed", tmp_path / "out")
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("Good good").ids
    assert found == AutoTokenizer.from_pretrained(source)("Good good")["input_ids"]
    assert found != Tokenizer.from_file(str(source / "tokenizer.json")).encode("Good good").ids


def test_lowercasing_by_sentence_transformers_goes_into_the_tokenizer(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    source = copy(saved["embed"], tmp_path)
    (source / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    export_encoder(source, "embed", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("W7 w8").ids == [7, 8]


# Files


def test_external_data_loads_checks_and_is_never_left_dangling(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    inside = export_encoder(saved["classify"], "classify", tmp_path / "inside")
    outside = export_encoder(saved["classify"], "classify", tmp_path / "outside", external_threshold=1000)
    data = tmp_path / "outside" / "model.onnx.data"
    assert data.stat().st_size > outside.path.stat().st_size
    np.testing.assert_array_equal(run(outside.path)[0], run(inside.path)[0])
    # Read back and saved elsewhere, as the quantizer does it.
    save_graph(read_graph(outside.path), tmp_path / "again" / "engine.onnx", external_threshold=1000)
    assert (tmp_path / "again" / "engine.onnx.data").is_file()
    np.testing.assert_array_equal(run(tmp_path / "again" / "engine.onnx")[0], run(inside.path)[0])
    # The next export needs no external file: the old one goes.
    export_encoder(saved["classify"], "classify", tmp_path / "outside")
    assert not data.exists()
    verify_graph(outside.path)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_graph_without_its_data_is_refused(damage: str, saved: dict[str, Path], tmp_path: Path) -> None:
    graph = export_encoder(saved["classify"], "classify", tmp_path, external_threshold=1000)
    data = tmp_path / "model.onnx.data"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=r"weights file .*model\.onnx\.data"):
        verify_graph(graph.path)
    with pytest.raises(ArtifactError, match=r"weights file .*model\.onnx\.data"):
        read_graph(graph.path)


def test_a_failed_write_leaves_nothing(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("build_engines.export.graph.store_external", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        export_encoder(saved["classify"], "classify", tmp_path, external_threshold=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_tokenizer_that_keeps_the_end_of_long_texts_is_refused(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    source = copy(saved["embed"], tmp_path)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "truncation_side": "left"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ExportError, match=r"truncation_side 'left'.*supported is 'right'"):
        export_encoder(source, "embed", tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [{"hidden_act": []}, {"layer_norm_eps": "abc"}, {"pad_token_id": [1]}, {"architectures": 5}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_value_of_the_wrong_type_names_its_file(
    saved: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    source = copy(saved["classify"], tmp_path, **settings)
    with pytest.raises(ExportError, match=r"config\.json holds a value of the wrong type"):
        export_encoder(source, "classify", tmp_path / "out")
