"""Engines on an NVIDIA GPU, behind the interfaces of the engines on the CPU."""
