"""Calibrated INT8: FP32 graph and texts in, explicit Q/DQ out, in the form that TensorRT takes."""

from build_engines.quantize.calibrators import CALIBRATORS
from build_engines.quantize.linears import Linear, find_linears
from build_engines.quantize.quantizer import Quantizer
from build_engines.quantize.statistics import InputStatistics, collect_statistics

__all__ = ["CALIBRATORS", "InputStatistics", "Linear", "Quantizer", "collect_statistics", "find_linears"]
