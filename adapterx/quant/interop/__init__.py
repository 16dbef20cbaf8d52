"""Checkpoints that other libraries quantized, read into our own weights without loss; of safetensors and JSON alone."""

from adapterx.quant.interop.checkpoint import is_quantized, load_checkpoint, place_source, read_quantized

__all__ = ["is_quantized", "load_checkpoint", "place_source", "read_quantized"]
