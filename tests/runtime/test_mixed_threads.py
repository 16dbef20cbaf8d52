"""Thirty-two threads mix sixteen adapters while these are loaded, replaced, unloaded, evicted and moved into files."""

import os
import random
import threading

import numpy as np
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import UnknownAdapter
from adapterx.runtime.session import AdapterSession
from tests.runtime.chain import Chain
from tests.runtime.test_session import options

D, TOKENS, ROWS, THREADS = 8, 3, 8, 32
# ADAPTERX_SOAK=100000 takes minutes.
RESULTS = int(os.environ.get("ADAPTERX_SOAK", "10000"))
CHAIN = Chain(layers=(("fc", D, D), ("head", D, 4)))
NAMES = [f"a{i}" for i in range(16)]
X = np.random.default_rng(0).uniform(0.5, 1, (ROWS, TOKENS, D)).astype(np.float32)


def signed(name, version):
    """An adapter whose result tells which one it is; ranks differ."""
    number = 2 * NAMES.index(name) + version + 1
    rank = 1 + number % 5
    sites = {}
    for site, d_in, d_out in CHAIN.layers:
        a = np.ones((rank, d_in), np.float32) / d_in
        sites[site] = LowRank(a=a, b=np.full((rank, d_out), number * 0.03 / rank, np.float32))
    return Adapter(sites)


# [name, version, row, token, feature]
SIGNATURES = np.array([[CHAIN.reference(X, signed(name, version)) for version in (0, 1)] for name in NAMES])
BASE = CHAIN.reference(X)


def test_no_two_signatures_are_alike():
    flat = np.concatenate([SIGNATURES.reshape(32, -1), BASE.reshape(1, -1)])
    apart = [np.abs(flat[i] - flat[j]).max() for i in range(33) for j in range(i)]
    assert min(apart) > 1e-3


def wrong_rows(entries, got):
    """Rows that are whole neither in the one version of their adapter nor in the other."""
    for row, name in enumerate(entries):
        allowed = [BASE[row]] if name is None else SIGNATURES[NAMES.index(name), :, row]
        if not any(np.abs(got[row] - one).max() < 1e-4 for one in allowed):
            yield row, name


def run_and_check(session, seed, counted, wrong):
    rng = random.Random(seed)
    while sum(counted) < RESULTS and not wrong:
        entries = [rng.choice([*NAMES, None]) for _ in range(ROWS)]
        try:
            got = session.run(None, {"x": X}, adapters=entries)[0]
        except UnknownAdapter:
            continue
        wrong += wrong_rows(entries, got)
        counted[seed] += ROWS


def load_and_unload(session, seed, stop):
    rng = random.Random(seed)
    while not stop.is_set():
        name = rng.choice(NAMES)
        session.load_adapter(name, signed(name, rng.randrange(2)))
        if rng.random() < 0.2:
            session.unload_adapter(name)
            session.load_adapter(name, signed(name, rng.randrange(2)))
        stop.wait(0.001)


@pytest.mark.parametrize("kernels", ["off", "require"])
def test_no_result_is_another_tenants(kernels):
    limits = {"max_loras": 8, "max_bank_bytes": 12_000, "max_cpu_loras": 10}
    session = AdapterSession(
        CHAIN.model(), {name: signed(name, 0) for name in NAMES}, session_options=options(), kernels=kernels, **limits
    )
    counted, wrong, failed, stop = [0] * THREADS, [], [], threading.Event()

    def kept(work, *arguments):
        try:
            work(session, *arguments)
        except BaseException as error:
            failed.append(error)
            wrong.append(error)

    runners = [threading.Thread(target=kept, args=(run_and_check, i, counted, wrong)) for i in range(THREADS)]
    writer = threading.Thread(target=kept, args=(load_and_unload, 99, stop))
    for thread in (writer, *runners):
        thread.start()
    for thread in runners:
        thread.join()
    stop.set()
    writer.join()
    assert not failed, failed[0]
    assert not wrong
    assert sum(counted) >= RESULTS
