"""adapterx: one ONNX base model, many adapters.

Find the adapters inside exported models, take them out, and run them on ONNX Runtime, swapped between runs::

    import adapterx as ax

    ax.find_sites("model.onnx")                                         # where adapters act; prints as a table
    out = ax.extract_adapters("model.onnx", "out/", make_inputs=True)   # a base model and an adapter file
    session = ax.AdapterSession(out.model_path, adapters={"fr": out.adapter_path, "de": "peft_folder/"})
    session.run(None, feeds, adapter="fr")

Each name is imported when it is first used: a server that runs ready models never loads the code that rewrites
them, and nothing here ever imports torch. Errors are the classes of :mod:`adapterx.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterx import errors as errors
    from adapterx.adapter import Adapter as Adapter
    from adapterx.adapter import LowRank as LowRank
    from adapterx.combination import combine as combine
    from adapterx.convert import convert_adapter as convert_adapter
    from adapterx.errors import AdapterxError as AdapterxError
    from adapterx.errors import FeedError as FeedError
    from adapterx.errors import FormatError as FormatError
    from adapterx.errors import MismatchError as MismatchError
    from adapterx.errors import MissingDependency as MissingDependency
    from adapterx.errors import ModelError as ModelError
    from adapterx.errors import NoAdaptersFound as NoAdaptersFound
    from adapterx.errors import OptionError as OptionError
    from adapterx.errors import UnknownAdapter as UnknownAdapter
    from adapterx.errors import UnsupportedAdapter as UnsupportedAdapter
    from adapterx.errors import UnsupportedQuantization as UnsupportedQuantization
    from adapterx.formats import load_adapter as load_adapter
    from adapterx.formats import save_adapter as save_adapter
    from adapterx.graph.extract import Extraction as Extraction
    from adapterx.graph.extract import extract_adapters as extract_adapters
    from adapterx.graph.inject import Injection as Injection
    from adapterx.graph.inject import inject_adapters as inject_adapters
    from adapterx.graph.merge import merge_adapter as merge_adapter
    from adapterx.graph.merge import unmerge_adapter as unmerge_adapter
    from adapterx.graph.quantize import quantize_base as quantize_base
    from adapterx.graph.sites import find_sites as find_sites
    from adapterx.merge_table import Merge as Merge
    from adapterx.merged_checkpoint import merge_peft as merge_peft
    from adapterx.quantization_table import Quantization as Quantization
    from adapterx.runtime.session import AdapterSession as AdapterSession
    from adapterx.site import AdapterSite as AdapterSite
    from adapterx.verification import Verification as Verification
    from adapterx.verify import verify_extraction as verify_extraction
    from adapterx.verify_batch import verify_mixed as verify_mixed

    __version__: str

__all__ = [
    "Adapter",
    "AdapterSession",
    "AdapterSite",
    "AdapterxError",
    "Extraction",
    "FeedError",
    "FormatError",
    "Injection",
    "LowRank",
    "Merge",
    "MismatchError",
    "MissingDependency",
    "ModelError",
    "NoAdaptersFound",
    "OptionError",
    "Quantization",
    "UnknownAdapter",
    "UnsupportedAdapter",
    "UnsupportedQuantization",
    "Verification",
    "__version__",
    "combine",
    "convert_adapter",
    "errors",
    "extract_adapters",
    "find_sites",
    "inject_adapters",
    "load_adapter",
    "merge_adapter",
    "merge_peft",
    "quantize_base",
    "save_adapter",
    "unmerge_adapter",
    "verify_extraction",
    "verify_mixed",
]
# What is not here is an error class.
_HOMES = {
    "Adapter": "adapterx.adapter",
    "AdapterSession": "adapterx.runtime.session",
    "AdapterSite": "adapterx.site",
    "Extraction": "adapterx.graph.extract",
    "Injection": "adapterx.graph.inject",
    "LowRank": "adapterx.adapter",
    "Merge": "adapterx.merge_table",
    "Quantization": "adapterx.quantization_table",
    "Verification": "adapterx.verification",
    "combine": "adapterx.combination",
    "convert_adapter": "adapterx.convert",
    "extract_adapters": "adapterx.graph.extract",
    "find_sites": "adapterx.graph.sites",
    "inject_adapters": "adapterx.graph.inject",
    "load_adapter": "adapterx.formats",
    "merge_adapter": "adapterx.graph.merge",
    "merge_peft": "adapterx.merged_checkpoint",
    "quantize_base": "adapterx.graph.quantize",
    "save_adapter": "adapterx.formats",
    "unmerge_adapter": "adapterx.graph.merge",
    "verify_extraction": "adapterx.verify",
    "verify_mixed": "adapterx.verify_batch",
}


def __dir__() -> list[str]:
    return list(__all__)


# Hidden from type checkers, to which any name would exist otherwise, typos included.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        import importlib

        if name == "__version__":
            from importlib import metadata

            found = metadata.version("adapterx")
        elif name == "errors":
            found = importlib.import_module("adapterx.errors")
        elif name in __all__:
            found = getattr(importlib.import_module(_HOMES.get(name, "adapterx.errors")), name)
        else:
            raise AttributeError(f"module 'adapterx' has no attribute {name!r}")
        globals()[name] = found
        return found
