"""Residents for banks without any model, and what a lease on them must hold."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401
import numpy as np

from adapterx.adapter import GAIN, LORA_A, LORA_B, PROMPT, Adapter, LowRank, tensor_name
from adapterx.manifest import Manifest, Pack
from adapterx.runtime.bank import AdapterBank, Lease
from adapterx.runtime.ports import mask_columns, port_arrays
from adapterx.runtime.resident import Resident
from adapterx.site import LOW_RANK, VECTORS, AdapterSite, SiteTable

PACKED = ("l.0.q", "l.1.q", "l.2.q")
PLAIN = ("l.0.o", "head")


def site(name: str, d_in: int, d_out: int, ports: tuple[str, ...] = LOW_RANK, dtype: str = "float32") -> AdapterSite:
    activations = "float32" if dtype == "int8" else ""
    place = AdapterSite(name, "", "lora", "MatMul", d_in, d_out, 4, 1.0, dtype, "initializer", name, ports=ports)
    return dataclasses.replace(place, activations=activations)


def manifest_of(*, vectors: bool = False, unmixed: Iterable[str] = (), dtype: str = "float32", d: int = 8) -> Manifest:
    """Three sites in packs, two plain ones; with ``vectors`` a gain beside matrices, one alone, and a prompt."""
    sites = [site(name, d, d + 2, dtype=dtype) for name in PACKED]
    sites += [site("l.0.o", d + 2, d, dtype=dtype)]
    sites += [site("head", d, 5, (*LOW_RANK, GAIN) if vectors else LOW_RANK, dtype)]
    if vectors:
        sites += [site("norm", d, d, (GAIN,), dtype), site("prefix", d, d, (PROMPT,), dtype)]
    packs = tuple(Pack(f"q.{side}.weight.packed", side, PACKED) for side in sites[0].graph_ports)
    why = dict.fromkeys((*unmixed, *(["prefix"] if vectors else [])), "its rows are shuffled")
    return Manifest(SiteTable(sites), "packed", True, True, "", packs=packs, unmixed=why)


def resident(manifest: Manifest, seed: int, ranks: Mapping[str, int], *, number: float | None = None) -> Resident:
    """Random numbers, or one number everywhere, at the sites of ``ranks``; those that cannot be mixed stay out."""
    rng = np.random.default_rng(seed)

    def array(rows: int, width: int, dtype: str) -> np.ndarray:
        drawn = rng.standard_normal((rows, width)) if number is None else np.full((rows, width), number)
        return drawn.astype(np.dtype(dtype))

    sites = {}
    for each in manifest.sites:
        if each.name in ranks and each.name not in manifest.unmixed:
            rank = ranks[each.name] if LORA_A in each.ports else 0
            a, b = (array(rank, each.width(side)[0], each.fitted_dtype) for side in (LORA_A, LORA_B))
            parts = {port: array(1, each.width(port)[0], each.fitted_dtype) for port in each.ports if port in VECTORS}
            sites[each.name] = LowRank(a=a, b=b, parts=parts)
    adapter = Adapter(sites)
    arrays = port_arrays(adapter, manifest)
    return Resident(adapter, seed, {}, arrays, mask_columns(arrays, manifest))


def whole(manifest: Manifest, seed: int, rank: int, *, number: float | None = None) -> Resident:
    """The same rank everywhere."""
    return resident(manifest, seed, {each.name: rank for each in manifest.sites}, number=number)


def bank_inputs(manifest: Manifest) -> dict[str, tuple[int, bool]]:
    """Members of each input of a bank, and whether it is a vector: written down anew, not asked of the bank."""
    packed = {tensor_name(name, pack.side) for pack in manifest.packs for name in pack.sites}
    found = {pack.name: (len(pack.sites), False) for pack in manifest.packs}
    for each in manifest.sites:
        for port in each.graph_ports:
            name = tensor_name(each.name, port)
            if port != PROMPT and name not in packed and each.name not in manifest.unmixed:
                found[name] = (1, port in VECTORS)
    return found


def numbers(value: Any) -> np.ndarray:
    """The memory of an OrtValue; onnxruntime has no numpy view of bfloat16."""
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = tuple(value.shape())
    memory = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.frombuffer(memory, np.dtype("bfloat16")).reshape(shape)


def assert_holds(lease: Lease, residents: Iterable[Resident], manifest: Manifest) -> None:
    """Every input has exactly the adapters' bytes in their ranges, zeros where they have nothing, nothing twice."""
    residents = list(residents)
    assert set(lease.ranges) == set(lease.rows) == set(residents)
    taken = sorted((lease.ranges[each].start, lease.ranges[each].stop) for each in residents if each.rank)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(taken))
    assert all(0 <= start < stop <= lease.rank for start, stop in taken)
    assert len({lease.rows[each] for each in residents}) == len(residents)
    assert all(0 <= row < lease.count for row in lease.rows.values())
    inputs = bank_inputs(manifest)
    assert set(lease.tensors) == set(inputs)
    unmixed = [i for i, name in enumerate(PACKED) if name in manifest.unmixed]
    for name, (members, is_vector) in inputs.items():
        held = numbers(lease.tensors[name])
        held = held.reshape(members, -1, held.shape[-1])
        assert held.shape[1] == (lease.count if is_vector else lease.rank)
        if members > 1:
            assert not held[unmixed].any()
        for each in residents:
            start = lease.rows[each]
            place = slice(start, start + 1) if is_vector else lease.ranges[each]
            here = held[:, place]
            given = each.arrays.get(name, np.zeros((0, held.shape[-1]), held.dtype))
            given = given.reshape(members, -1, held.shape[-1])
            np.testing.assert_array_equal(here[:, : given.shape[1]], given.view(here.dtype), err_msg=name)
            assert not here[:, given.shape[1] :].any(), name


def leased(bank: AdapterBank, *residents: Resident) -> Lease:
    """A lease that was given back."""
    with bank.lease(residents) as lease:
        return lease


def copies(lease: Lease) -> dict[str, np.ndarray]:
    """What its arrays hold at this moment."""
    return {name: numbers(value).copy() for name, value in lease.tensors.items()}


def shelf_nbytes(manifest: Manifest, rows: int) -> int:
    """Bytes of a bank with one shelf, of so many rows."""
    bank = AdapterBank(manifest)
    leased(bank, whole(manifest, 0, rows))
    return bank.nbytes
