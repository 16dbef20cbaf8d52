"""adapterx: one ONNX base model, many adapters."""
