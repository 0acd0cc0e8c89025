"""Served models against Transformers in process: same texts, same machine, same run."""
