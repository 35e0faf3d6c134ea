"""Traced backbones and their files, as a device opens them. No torch, no ``onnx``."""
