"""Where precision is decided, once, on the ONNX graph (ADR-0004): passes to fp16 and to int8. fp32 needs none."""
