"""From a stack file to gated INT8 and FP16 engines."""

__version__ = "0.1.0"
