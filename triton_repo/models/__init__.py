"""The Python-backend model files; the writer copies them verbatim as <model>/1/model.py."""
