"""Distil a large language model into a small one, and take it to a device: teacher → student → GGUF → bundle."""

__version__ = "0.1.0"
