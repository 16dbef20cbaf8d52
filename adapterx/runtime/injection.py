"""A model that has no ports, given to a session together with adapters: the ports are put in, in memory.

Only here does the runtime know of the room that rewrites graphs, and only when such a model comes: a server with a
ready model never imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from adapterx.adapter import Adapter
from adapterx.port_dtype import AdapterDtype
from adapterx.runtime.relocation import relocate


def with_ports(
    model: Path | onnx.ModelProto, adapters: Sequence[Adapter], *, adapter_dtype: AdapterDtype | None = None
) -> tuple[onnx.ModelProto, Path | None]:
    """``model`` with a port at every site of ``adapters``, and the folder of its external data.

    Args:
        model: a path, or a proto without external data; not changed
        adapters: they say where sites are, and what each has to take
        adapter_dtype: of the ports of linear layers, in place of that of their activations

    Raises:
        ModelError: broken, or a model that still has an adapter inside.
        MismatchError: sites that the model has no operation for.
        OptionError: no such element type.
    """
    from adapterx.graph.inject import injected  # noqa: PLC0415 - see above

    graph, folder = injected(model, adapters, adapter_dtype=adapter_dtype)
    if folder is None:
        return graph, None
    return graph, relocate(graph, folder, model_file=model if isinstance(model, Path) else None)
