"""The manifest: one JSON string in a model's ``metadata_props`` that says where its adapters go.

Reading it needs no weights. `docs/formats.md` is its specification.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from adapterx.adapter import LORA_A, LORA_B, tensor_name
from adapterx.errors import ModelError
from adapterx.site import AdapterSite, SiteTable

KEY = "adapterx.manifest"
FORMAT_VERSION = 1
MASK = "adapter_mask"

Port = Literal["input", "packed", "external"]

_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


@dataclasses.dataclass(frozen=True, slots=True)
class Pack:
    """One packed graph input: the same side of several sites, stacked on axis 0 in natural order.

    Args:
        name: the graph input, ``q_proj.lora_A.weight.packed``
        side: ``lora_A`` or ``lora_B``
        sites: the members, in stacking order; all have the same shape
    """

    name: str
    side: str
    sites: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a runtime must know of an extracted model.

    Args:
        sites: one row a site (never two rows of one name: several adapters at a place share its port)
        port: how weights come in: graph ``input``s, ``packed`` inputs (what could not be packed is a plain
            input), or ``external`` initializers whose file does not exist
        dynamic_rank: the rank of a port is symbolic, any rank fits; else exactly ``site.rank``
        optional: a port that is not fed makes its site the base
        fingerprint: SHA-256 over samples of the base weights, ``""`` where none could be read
        packs: packed inputs, empty unless ``port == "packed"``
        mask: name of the ``[n, R]`` mask input, ``None`` in external mode
        location: file name that external initializers point at, ``None`` in the other modes
        base_model: what the exported adapter calls its base, where it was given at extraction, else ``""``
        elsewhere: sites of the same adapters that other files of the export hold (an encoder's, in a decoder)
    """

    sites: SiteTable
    port: Port
    dynamic_rank: bool
    optional: bool
    fingerprint: str
    packs: tuple[Pack, ...] = ()
    mask: str | None = MASK
    location: str | None = None
    base_model: str = ""
    elsewhere: tuple[str, ...] = ()

    def tensor_names(self) -> dict[str, tuple[str, str]]:
        """Site name -> names of its ``a`` and ``b`` in adapter files, and in the graph where not packed."""
        return {s.name: (tensor_name(s.name, LORA_A), tensor_name(s.name, LORA_B)) for s in self.sites}

    def dumps(self) -> str:
        """The JSON string that goes into the model."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["sites"] = [site.as_dict() for site in self.sites]
        fields["packs"] = [dataclasses.asdict(pack) for pack in self.packs]
        return json.dumps({"format_version": FORMAT_VERSION, **fields}, separators=(",", ":"))

    @classmethod
    def loads(cls, text: str, *, where: str) -> Manifest:
        """Parse and check a manifest.

        Args:
            text: the JSON string
            where: the model's name for messages

        Raises:
            ModelError: not JSON, another format version, or fields that are missing, unknown or of a wrong type.
        """
        try:
            raw = json.loads(text)
            version = raw.pop("format_version")
            if version != FORMAT_VERSION:
                raise ModelError(
                    f"{where}: manifest has format version {version!r}, this adapterx reads {FORMAT_VERSION}; "
                    "extract the model again with this version"
                )
            if raw["port"] not in get_args(Port):
                raise ModelError(f"{where}: manifest has port {raw['port']!r}; expected one of {get_args(Port)}")
            raw["sites"] = SiteTable(_site(site) for site in raw["sites"])
            raw["packs"] = tuple(Pack(p["name"], p["side"], tuple(p["sites"])) for p in raw["packs"])
            raw["elsewhere"] = tuple(raw.get("elsewhere", ()))
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{where}: its adapterx manifest is broken ({error}); extract the model again") from None


def _site(raw: dict[str, Any]) -> AdapterSite:
    site = AdapterSite(**raw)
    sizes = (site.d_in, site.d_out, site.rank)
    if site.dtype not in _DTYPES or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"site {site.name!r} has dtype {site.dtype!r} and sizes {sizes}")
    return site


def manifest_of(metadata: Mapping[str, Any], *, where: str) -> Manifest | None:
    """The manifest among a model's metadata, or ``None`` when the model is not one of ours."""
    text = metadata.get(KEY)
    return None if text is None else Manifest.loads(str(text), where=where)
