"""Ways a model leaves Python: program.py (torch.export), onnx.py (one ONNX file for every backend)."""
