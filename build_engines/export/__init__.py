"""Hugging Face checkpoints in, ONNX graphs out; no torch anywhere on the way.

Encoders: `export_encoder` writes the FP32 graph, `to_fp16` turns an FP32 graph (with or without Q/DQ) into
FP16; the names that other stages rely on are listed in `build_engines.export.encoder`. Causal LMs:
`open_decoder` checks a checkpoint, `write_decoder` streams it into a graph; names in
`build_engines.export.decoder`.
"""

from build_engines.export.decoder import QuantizedSource, layer_graph, open_decoder, write_decoder
from build_engines.export.decoder_config import Architecture, LayerKind
from build_engines.export.decoder_serving import copy_chat_tokenizer, decoder_serving
from build_engines.export.decoder_weights import Decoder
from build_engines.export.encoder import ExportedGraph, export_encoder
from build_engines.export.half import half_tensors, to_fp16

__all__ = [
    "Architecture",
    "Decoder",
    "ExportedGraph",
    "LayerKind",
    "QuantizedSource",
    "copy_chat_tokenizer",
    "decoder_serving",
    "export_encoder",
    "half_tensors",
    "layer_graph",
    "open_decoder",
    "to_fp16",
    "write_decoder",
]
