"""Hugging Face encoder checkpoints in, ONNX graphs out; no torch anywhere on the way.

`export_encoder` writes the FP32 graph, `to_fp16` turns an FP32 graph (with or without Q/DQ) into FP16. The
names that other stages rely on are listed in `build_engines.export.encoder`.
"""

from build_engines.export.encoder import ExportedGraph, export_encoder
from build_engines.export.half import half_tensors, to_fp16, to_fp16_file

__all__ = ["ExportedGraph", "export_encoder", "half_tensors", "to_fp16", "to_fp16_file"]
