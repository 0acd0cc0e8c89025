"""Texts in, typed and deterministic samples out; the bundled review data."""
