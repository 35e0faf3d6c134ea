"""Where precision is decided, once, on the ONNX graph (ADR-0004): the fp16 pass. fp32 needs none."""
