"""Bound: IOBinding without its traps."""

import itertools
import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from adapterx.errors import UnknownAdapter
from adapterx.runtime.session import AdapterSession
from tests.runtime.chain import NAMES, Chain, adapter_of, rows
from tests.runtime.crowd import in_threads


def opened(port: str = "input", count: int = 3, model: onnx.ModelProto | None = None) -> AdapterSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    adapters = {f"a{seed}": adapter_of(seed, 1 + seed) for seed in range(count)}
    return AdapterSession(model or Chain(port=port).model(), adapters, session_options=options)


@pytest.mark.parametrize("port", ["input", "packed", "external"])
def test_a_bound_run_equals_run_bit_for_bit_across_rebinds_and_shapes(port):
    session = opened(port)
    session.load_adapter("part", adapter_of(9, ranks={NAMES[1]: 2}))
    bound = session.bind()
    for name in (None, "a0", "part", "a2", None, "part", "a0"):
        bound.rebind(name)
        for feeds in (rows(), rows(4, 1, seed=8), rows(1, 9)):
            assert np.array_equal(bound.run(["y"], feeds)[0], session.run(["y"], feeds, adapter=name)[0])


def test_results_belong_to_the_caller_and_no_later_run_writes_into_them():
    bound = opened().bind("a1")
    first = bound.run(None, rows(seed=1))[0]
    kept = first.copy()
    bound.run(None, rows(seed=2))
    bound.rebind("a2")
    bound.run(None, rows(seed=1))
    assert np.array_equal(first, kept)
    assert first.flags.owndata
    assert first.flags.writeable


def test_a_bound_object_keeps_its_adapter_through_unload_and_reload_until_it_is_rebound():
    session = opened()
    bound, wanted = session.bind("a1"), session.run(None, rows(), adapter="a1")[0]
    session.load_adapter("a1", adapter_of(7))
    assert np.array_equal(bound.run(None, rows())[0], wanted)
    session.unload_adapter("a1")
    assert np.array_equal(bound.run(None, rows())[0], wanted)
    with pytest.raises(UnknownAdapter):
        bound.rebind("a1")
    assert np.array_equal(bound.run(None, rows())[0], wanted)
    session.load_adapter("a1", adapter_of(7))
    bound.rebind("a1")
    assert np.array_equal(bound.run(None, rows())[0], session.run(None, rows(), adapter="a1")[0])


def test_an_optional_feed_of_one_run_is_forgotten_in_the_next():
    model = Chain().model()
    model.graph.input.append(helper.make_tensor_value_info("shift", onnx.TensorProto.FLOAT, ["one"]))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "shift"))
    model.graph.node[-1].output[0] = "unshifted"
    model.graph.node.append(helper.make_node("Add", ["unshifted", "shift"], ["y"]))
    session = opened(model=model)
    bound, adapted = session.bind("a1"), session.run(None, rows(), adapter="a1")[0]
    shifted = bound.run(None, {**rows(), "shift": np.ones(1, np.float32)})[0]
    np.testing.assert_allclose(shifted, adapted + 1, rtol=1e-6)
    assert np.array_equal(bound.run(None, rows())[0], adapted)


def test_a_run_gives_the_outputs_that_it_asks_for_whatever_an_earlier_one_asked_for():
    model = Chain().model()
    model.graph.output.append(helper.make_tensor_value_info(f"{NAMES[0]}/y", onnx.TensorProto.FLOAT, ["n", "t", 8]))
    bound = opened(model=model).bind("a1")
    both = bound.run(None, rows())
    assert [result.shape for result in both] == [(2, 3, 5), (2, 3, 8)]
    assert [result.shape for result in bound.run(["y"], rows())] == [(2, 3, 5)]
    turned = bound.run([f"{NAMES[0]}/y", "y"], rows())
    assert all(np.array_equal(got, wanted) for got, wanted in zip(turned, reversed(both), strict=True))


def test_two_threads_on_one_bound_object_each_get_the_results_of_their_own_feeds():
    session = opened()
    bound = session.bind("a1")
    feeds = [rows(seed=seed) for seed in range(2)]
    wanted = [session.run(None, each, adapter="a1")[0] for each in feeds]
    wrong: list[int] = []

    def work(mine: int) -> None:
        wrong.extend(mine for _ in range(400) if not np.array_equal(bound.run(None, feeds[mine])[0], wanted[mine]))

    in_threads(work, 2)
    assert not wrong


def test_rebinding_while_another_thread_runs_never_mixes_two_adapters():
    session = opened()
    bound, feeds = session.bind("a0"), rows()
    allowed = {session.run(None, feeds, adapter=name)[0].tobytes() for name in session.adapters}
    seen: set[bytes] = set()
    over = threading.Event()

    def work(index: int) -> None:
        if index == 0:
            for turn in itertools.takewhile(lambda _: not over.is_set(), itertools.count()):
                bound.rebind(f"a{turn % 3}")
            return
        for step in itertools.count():
            seen.add(bound.run(None, feeds)[0].tobytes())
            if step > 300 and (len(seen) > 2 or step > 20_000):
                break
        over.set()

    in_threads(work, 2)
    assert seen == allowed
