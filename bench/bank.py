"""What it costs to put a loaded adapter into a bank, and to find adapters that lie there.

Peer: memcpy of the same bytes between arrays of the same sizes, in one thread. No model runs; the bank has the shape of
Llama-3.2-1B (16 layers of 7 sites, rank 16 in float32: 45 MB an adapter).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
from llama_export import Llama
from measure import Result, Row, Way, clock_option, interleaved, megabytes, options, report, rows

import adapterx as ax
from adapterx.manifest import Manifest
from adapterx.runtime.bank import AdapterBank
from adapterx.runtime.inference import ort_values
from adapterx.runtime.mapped import mapped_resident
from adapterx.runtime.ports import mask_columns, port_arrays
from adapterx.runtime.resident import Resident
from adapterx.site import AdapterSite, SiteTable

FULL = Llama(layers=16, d=2048, kv=512, ff=8192, rank=16)
QUICK = Llama(layers=2, d=64, kv=32, ff=96, rank=4)
BATCH = 8
MEMCPY = "memcpy of the same bytes, array by array"
LOOKUP = "8 lookups in a dict"


def manifest_of(sizes: Llama) -> Manifest:
    """Every linear site of the model, as graph inputs."""
    sites = SiteTable(
        AdapterSite(name, "", "lora", "MatMul", d_in, d_out, sizes.rank, 1.0, "float32", "initializer", name)
        for name, (d_in, d_out) in sizes.sites().items()
    )
    return Manifest(sites, "input", dynamic_rank=True, optional=True, fingerprint="")


def resident(sizes: Llama, manifest: Manifest, number: int) -> Resident:
    """An adapter that is full of its own number."""

    def full(width: int) -> np.ndarray:
        return np.full((sizes.rank, width), number, np.float32)

    places = {name: ax.LowRank(a=full(d_in), b=full(d_out)) for name, (d_in, d_out) in sizes.sites().items()}
    adapter = ax.Adapter(places)
    arrays = port_arrays(adapter, manifest)
    return Resident(adapter, number, {}, arrays, mask_columns(arrays, manifest))


def in_turn(bank: AdapterBank, residents: Iterable[Resident]) -> Way:
    """Lease one after the other, in room for one, so that every lease copies."""
    turn = itertools.cycle(residents)

    def lease() -> None:
        loads = bank.stats.loads
        with bank.lease([next(turn)]):
            assert bank.stats.loads == loads + 1, "it lay there already"

    return lease


def activations(manifest: Manifest, pair: list[Resident]) -> dict[str, Way]:
    """Ways to bring the bytes of one adapter to where a run reads them."""
    used = {name: np.ones_like(array) for name, array in pair[0].arrays.items()}

    def memcpy() -> None:
        for name, array in pair[1].arrays.items():
            np.copyto(used[name], array)

    def bank(*, exact: bool) -> AdapterBank:
        return AdapterBank(manifest, max_loras=1, exact=exact)

    files = [mapped_resident(each, ort_values) for each in pair]
    return {
        MEMCPY: memcpy,
        "adapterx, lease, standard operators": in_turn(bank(exact=False), pair),
        "adapterx, lease, kernels": in_turn(bank(exact=True), pair),
        "adapterx, lease, kernels, adapters in mapped files": in_turn(bank(exact=True), files),
    }


def hits(manifest: Manifest, one: Resident) -> dict[str, Way]:
    """Ways to find the adapters of a batch; what they copied on the first call lies there on the next."""
    batch = [dataclasses.replace(one, generation=i) for i in range(BATCH)]
    places = {each: i for i, each in enumerate(batch)}

    def leases(*, exact: bool) -> Way:
        bank = AdapterBank(manifest, exact=exact)

        def lease() -> None:
            with bank.lease(batch):
                pass

        return lease

    return {
        LOOKUP: lambda: [places[each] for each in batch],
        "adapterx, lease of 8 that lie there, standard operators": leases(exact=False),
        "adapterx, lease of 8 that lie there, kernels": leases(exact=True),
    }


def main() -> None:
    parser = options(__doc__)
    clock_option(parser)
    parser.add_argument("--rounds", type=int, help="turns of each way (20, or 3 with --quick)")
    chosen = parser.parse_args()
    sizes, rounds = (QUICK, 3) if chosen.quick else (FULL, 20)
    rounds = chosen.rounds or rounds
    manifest = manifest_of(sizes)
    pair = [resident(sizes, manifest, number) for number in (1, 2)]
    nbytes = sum(array.nbytes for array in pair[0].arrays.values())
    times = interleaved(activations(manifest, pair), rounds=rounds, clock=chosen.clock)
    measured = [
        Row(r.way, r.milliseconds, r.low, r.high, {"GB/s": f"{nbytes / r.milliseconds / 1e6:.2f}"}) for r in rows(times)
    ]
    title = f"put a loaded adapter into a bank, {len(pair[0].arrays)} arrays, {megabytes(nbytes)}"
    results = [Result(title, MEMCPY, measured)]
    times = interleaved(hits(manifest, pair[0]), rounds=rounds, repeat=20, clock=chosen.clock)
    results.append(Result("find the adapters of a batch", LOOKUP, rows(times)))
    report(results, as_json=chosen.json)


if __name__ == "__main__":
    main()
