"""The compiled kernels of adapterx for ONNX Runtime: a library, and where it lies.

``adapterx.AdapterSession`` finds and uses it by itself. By hand, with any model that adapterx wrote::

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(adapterx_kernels.library()))
"""

from pathlib import Path

from adapterx_kernels.build import LIBRARY, ORT_API, PROVIDERS, VERSION

__all__ = ["ORT_API", "PROVIDERS", "__version__", "library"]

__version__ = VERSION


def library() -> Path:
    """The library. It holds kernels for ``PROVIDERS`` and loads into ONNX Runtime 1.``ORT_API`` and newer."""
    return Path(__file__).parent / LIBRARY
