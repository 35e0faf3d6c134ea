"""What runs on a device: runners, the store, exported models. No torch, no ``onnx``."""
