"""Tenants in threads: whatever is loaded and unloaded meanwhile, nobody gets another's result."""

import random

import numpy as np
import onnxruntime as ort
import pytest

from adapterx.errors import UnknownAdapter
from adapterx.runtime.session import AdapterSession
from tests.runtime.chain import Chain, adapter_of, rows
from tests.runtime.crowd import THREADS, in_threads

ADAPTERS = 16


def opened(port: str, **limits: int) -> AdapterSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return AdapterSession(Chain(port=port).model(), session_options=options, **limits)


@pytest.mark.parametrize(
    ("port", "limits", "steps"),
    [("input", {}, 1500), ("packed", {}, 800), ("external", {"max_sessions": 3}, 50)],
    ids=["input", "packed", "external"],
)
def test_under_random_loads_reloads_and_unloads_every_result_is_the_named_adapters_bit_for_bit(port, limits, steps):
    session, feeds = opened(port, **limits), rows()
    adapters = {f"t{seed}": adapter_of(seed, 1 + seed % 5) for seed in range(ADAPTERS)}
    wanted = {None: session.run(None, feeds)[0]}
    for name, adapter in adapters.items():
        session.load_adapter(name, adapter)
        wanted[name] = session.run(None, feeds, adapter=name)[0]
    assert len({result.tobytes() for result in wanted.values()}) == ADAPTERS + 1
    checked, wrong = [0] * THREADS, []

    def tenant(index: int) -> None:
        dice, bound = random.Random(index), session.bind()
        for _ in range(steps):
            name = dice.choice(list(adapters))
            try:
                match dice.randrange(10):
                    case 0:
                        session.unload_adapter(name)
                        continue
                    case 1 | 2:
                        session.load_adapter(name, adapters[name])
                        continue
                    case 3 | 4:
                        bound.rebind(name)
                        result = bound.run(None, feeds)[0]
                    case 5:
                        name, result = None, session.run(None, feeds)[0]
                    case _:
                        result = session.run(None, feeds, adapter=name)[0]
            except UnknownAdapter:
                continue
            checked[index] += 1
            if not np.array_equal(result, wanted[name]):
                wrong.append(name)

    in_threads(tenant)
    assert not wrong
    assert sum(checked) > THREADS * steps / 4


def test_a_name_that_is_given_to_other_content_never_serves_a_mixture():
    session, feeds = opened("input"), rows()
    versions = [adapter_of(seed, 2 + seed) for seed in range(3)]
    allowed = set()
    for version in versions:
        session.load_adapter("it", version)
        allowed.add(session.run(None, feeds, adapter="it")[0].tobytes())

    def work(index: int) -> None:
        for step in range(150):
            if index < 2:
                session.load_adapter("it", versions[(step + index) % 3])
            else:
                assert session.run(None, feeds, adapter="it")[0].tobytes() in allowed

    in_threads(work)


def test_loads_from_many_threads_lose_no_name_and_repeat_no_generation():
    session, adapter = opened("input"), adapter_of()
    # Many names make the window between reading and replacing the table wide enough to be hit.
    for index in range(1000):
        session.load_adapter(f"old-{index}", adapter)

    def work(index: int) -> None:
        for step in range(40):
            session.load_adapter(f"t{index}-{step}", adapter)
            if step % 2:
                session.unload_adapter(f"t{index}-{step}")

    in_threads(work)
    assert {name for name in session.adapters if name[0] == "t"} == {
        f"t{index}-{step}" for index in range(THREADS) for step in range(0, 40, 2)
    }
    generations = {session.identity(name).generation for name in session.adapters}
    assert len(generations) == len(session.adapters)


def test_a_session_that_many_ask_for_at_once_is_built_once(monkeypatch):
    session, made, create = opened("external"), [], ort.InferenceSession
    session.load_adapter("it", adapter_of())
    monkeypatch.setattr(ort, "InferenceSession", lambda *a, **k: made.append(1) or create(*a, **k))
    in_threads(lambda _: session.run(None, rows(), adapter="it"))
    assert len(made) == 1
