"""Quantize in torch, run on ONNX Runtime. Needs the extra ``[quant]``."""

from adapterx.errors import MissingDependency

try:
    import torch as _torch
except ImportError as missing:
    raise MissingDependency("adapterx.quant needs torch: pip install 'adapterx[quant]'") from missing

del _torch
