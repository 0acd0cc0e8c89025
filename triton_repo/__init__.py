"""Triton model repository: config.pbtxt, model files, server."""
