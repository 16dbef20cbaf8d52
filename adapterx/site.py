"""AdapterSite: a place in a graph where an adapter acts, as ``find_sites`` reports it and the manifest keeps it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, SupportsIndex, overload

from rich.console import Console
from rich.table import Table

from adapterx.adapter import GAIN, INPUT_GAIN, LORA_A, LORA_B, PROMPT, SHIFT

NameSource = Literal[
    "initializer", "folded_from", "name_scopes", "node_path", "adapter_values", "adapter_shapes", "structure"
]

Kind = Literal["lora", "dora", "ia3", "loha", "lokr", "vera", "conv", "embedding", "saved", "bias", "prompt"]

LOW_RANK: Final = (LORA_A, LORA_B)
PORTS: Final = (*LOW_RANK, GAIN, INPUT_GAIN, SHIFT, PROMPT)
# A row an adapter; all other ports have a row a rank.
VECTORS: Final = frozenset({GAIN, INPUT_GAIN, SHIFT})
# Beside int8 codes, a row a rank: what those of `a`, and those of `b`, are multiplied with. No adapter brings it.
LORA_SCALE: Final = "lora_scale"
RANKED: Final = (*LOW_RANK, LORA_SCALE)
_SHOWN: Final = 8


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterSite:
    """One base operation with one named module behind it.

    Args:
        name: module path of the source checkpoint, ``model.layers.3.self_attn.q_proj``
        adapter: the adapter's name inside the export (PEFT's ``default``), ``""`` where nothing tells it
        kind: adapter kind, ``"lora"``; :mod:`adapterx.kinds` describes each
        op: type of the base operation (``MatMul``, ``Gemm``, ``MatMulNBits`` ...)
        d_in: features that come in (of a convolution channels, of an embedding words)
        d_out: features that go out
        rank: rank in the graph; of an extracted model, of the adapter that was taken out; of a prompt its tokens
        scale: the factor that the graph applies after ``a`` and ``b`` (1.0 when it is absent or inside ``b``)
        dtype: numpy name of the element type of ``a`` and ``b``; ``int8`` for codes with a scale for each of their rows
        name_source: what told the name; ``structure`` means that nothing did
        node: name of the node where adapter and base meet
        kernel: sizes of a convolution's kernel, else empty
        ports: what an adapter can bring here, some of :data:`PORTS` in their order
        activations: numpy name of the element type of ``x``, and of all ports but ``a`` and ``b``; ``""`` where it is
            ``dtype``, as it is wherever nothing else was asked for
    """

    name: str
    adapter: str
    kind: str
    op: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    dtype: str
    name_source: NameSource
    node: str
    kernel: tuple[int, ...] = ()
    ports: tuple[str, ...] = LOW_RANK
    activations: str = ""

    @property
    def x_dtype(self) -> str:
        """Numpy name of the element type of ``x``."""
        return self.activations or self.dtype

    @property
    def fitted_dtype(self) -> str:
        """Numpy name of the element type of an adapter that was fitted: one that holds what every port gets."""
        types = {self.dtype_of(port) for port in self.ports}
        if types == {self.dtype} and self.dtype != "int8":
            return self.dtype
        return "float64" if "float64" in types else "float32"

    @property
    def graph_ports(self) -> tuple[str, ...]:
        """What the graph takes here: :attr:`ports`, and the scales of codes."""
        return (*self.ports, LORA_SCALE) if self.dtype == "int8" else self.ports

    def dtype_of(self, port: str) -> str:
        """Numpy name of the element type of ``port``."""
        if port == LORA_SCALE:
            return "float32"
        return self.dtype if port in LOW_RANK else self.x_dtype

    def rows(self, port: str) -> int:
        """Rows of one adapter's tensor at ``port``: its rank, or the one row of a vector."""
        return 1 if port in VECTORS else self.rank

    def width(self, port: str) -> tuple[int, ...]:
        """The dimensions of ``port`` after its rows."""
        if port == LORA_A:
            return self.d_in, *self.kernel
        if port == LORA_SCALE:
            return (2,)
        return (self.d_in,) if port == INPUT_GAIN else (self.d_out,)

    @property
    def is_embedding(self) -> bool:
        """Whether ids come in, not features."""
        return self.op in {"Gather", "GatherBlockQuantized"}

    @property
    def is_multiplied(self) -> bool:
        """Whether ``a`` and ``b`` come in through one ``LowRankAdd``: not at convolutions and embeddings."""
        return LORA_A in self.ports and not self.kernel and not self.is_embedding

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        return self.d_in, self.d_out

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, in the order above."""
        return dataclasses.asdict(self)


class SiteTable(list[AdapterSite]):
    """A list of sites that prints as a table.

    Args:
        sites: the rows
        left: what belongs to an adapter but is no site, in words; ``extract_adapters`` refuses such a model
        unmixed: of an extracted model, by site name, why the rows of one batch cannot have different adapters there
    """

    def __init__(
        self,
        sites: Iterable[AdapterSite] = (),
        *,
        left: Iterable[str] = (),
        unmixed: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(sites)
        self.left = tuple(left)
        self.unmixed = dict(unmixed or {})

    @property
    def names(self) -> list[str]:
        """The sites' names, in order."""
        return [site.name for site in self]

    @overload
    def __getitem__(self, index: SupportsIndex) -> AdapterSite: ...
    @overload
    def __getitem__(self, index: slice) -> SiteTable: ...
    def __getitem__(self, index: SupportsIndex | slice) -> AdapterSite | SiteTable:
        found = super().__getitem__(index)
        return SiteTable(found) if isinstance(found, list) else found

    def table(self) -> Table:
        """The sites as a rich table."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("site", "adapter", "kind", "op", "in -> out", "rank", "scale", "dtype", "name from"):
            table.add_column(column, no_wrap=True, justify="right" if column in {"rank", "scale"} else "left")
        for site in self:
            shape = f"{site.d_in} -> {site.d_out}"
            cells = (site.name, site.adapter or "?", site.kind, site.op, shape, str(site.rank), f"{site.scale:g}")
            table.add_row(*cells, site.dtype, site.name_source)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        width = 100 + max((len(site.name) for site in self), default=0)
        # Names come from files of strangers: nothing in them is markup.
        Console(file=text, width=width, markup=False, emoji=False, highlight=False).print(self.table())
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join([*lines, *(f"left out: {line}" for line in self.left), *unmixed_lines(self.unmixed)])


def unmixed_lines(unmixed: Mapping[str, str]) -> list[str]:
    """Where all rows of a batch have one adapter, a line for each reason.

    Example:
        >>> unmixed_lines({"fc1": "its rows are gathered", "fc2": "its rows are gathered"})
        ['one adapter for the whole batch at fc1, fc2: its rows are gathered']
    """
    by_reason: dict[str, list[str]] = {}
    for site, why in unmixed.items():
        by_reason.setdefault(why, []).append(site)
    lines = []
    for why, sites in by_reason.items():
        more = f" and {len(sites) - _SHOWN} more" if len(sites) > _SHOWN else ""
        lines.append(f"one adapter for the whole batch at {', '.join(sites[:_SHOWN])}{more}: {why}")
    return lines


def by_name(sites: Iterable[AdapterSite]) -> dict[str, AdapterSite]:
    """Sites by name; the first of several adapters at one place stands for the place."""
    table: dict[str, AdapterSite] = {}
    for site in sites:
        table.setdefault(site.name, site)
    return table
