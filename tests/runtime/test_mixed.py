"""Rows of one batch with adapters of their own, against the same rows alone; in every kind of port."""

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from adapterx.errors import FeedError, MismatchError, ModelError, OptionError, UnknownAdapter
from adapterx.manifest import KEY, Manifest
from adapterx.runtime.session import AdapterSession
from tests.runtime.chain import NAMES, Chain, adapter_of, rows
from tests.runtime.test_session import options

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FORMS = [
    pytest.param(Chain(port=port, optional=optional), id=f"{port}-{optional}")
    for port in ("input", "packed")
    for optional in (True, False)
]
ADAPTERS = {
    "fr": adapter_of(1),
    "de": adapter_of(2, rank=5),
    "head": adapter_of(3, ranks={NAMES[3]: 2}),
    "odd": adapter_of(4, ranks={NAMES[0]: 1, NAMES[2]: 7}),
}


def opened(chain: Chain, **more) -> AdapterSession:
    return AdapterSession(chain.model(), ADAPTERS, session_options=options(), **more)


def alone(chain: Chain, x: np.ndarray, entry) -> np.ndarray:
    """One row in float64, its adapters' changes weighed and summed at every layer."""
    weights = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else entry
    y = x.astype(np.float64)
    for (name, _, _), weight in zip(chain.layers, chain.weights(), strict=True):
        total = y @ weight
        for adapter, share in weights.items():
            if name in ADAPTERS[adapter].sites:
                change = ADAPTERS[adapter].sites[name]
                total = total + share * ((y @ change.a.T.astype(np.float64)) @ change.b.astype(np.float64))
        y = np.tanh(total)
    return y


def with_manifest(chain: Chain, **changes) -> onnx.ModelProto:
    model = chain.model()
    manifest = Manifest.loads(model.metadata_props[0].value, where="it")
    helper.set_model_props(model, {KEY: dataclasses.replace(manifest, **changes).dumps()})
    return model


@pytest.mark.parametrize("chain", FORMS)
def test_every_row_gets_what_it_gets_alone(chain):
    session = opened(chain)
    entries = ["fr", None, "de", {"fr": 0.7, "de": -0.3}, "head", {"odd": 2.0}, "fr", {"fr": 1.0, "odd": 0.5}]
    feeds = rows(n=len(entries))
    got = session.run(None, feeds, adapters=entries)[0]
    for i, entry in enumerate(entries):
        np.testing.assert_allclose(got[i], alone(chain, feeds["x"][i], entry), **CLOSE)
    distinct = np.unique(got.round(4).reshape(len(entries), -1), axis=0)
    assert len(distinct) == len(entries)


SESSIONS: dict[str, AdapterSession] = {}
ENTRY = st.one_of(
    st.none(),
    st.sampled_from(list(ADAPTERS)),
    st.dictionaries(st.sampled_from(list(ADAPTERS)), st.floats(-2, 2, width=32), max_size=4),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRY, max_size=9), st.sampled_from(["input", "packed"]), st.integers(1, 4), st.integers(0, 99))
def test_any_batch_equals_its_rows_one_by_one(entries, port, tokens, seed):
    chain = Chain(port=port)
    session = SESSIONS.setdefault(port, opened(chain, max_loras=4))
    feeds = rows(n=len(entries), t=tokens, seed=seed)
    got = session.run(None, feeds, adapters=entries)[0]
    assert got.shape[0] == len(entries)
    for i, entry in enumerate(entries):
        np.testing.assert_allclose(got[i], alone(chain, feeds["x"][i], entry), **CLOSE)


def test_no_state_survives_a_call():
    session, feeds = opened(Chain()), rows(n=3)
    base = session.run(None, feeds)[0]
    only = session.run(None, feeds, adapter="fr")[0]
    session.run(None, feeds, adapters=["fr", "de", {"odd": 0.5}])
    assert np.array_equal(session.run(None, feeds)[0], base)
    assert np.array_equal(session.run(None, feeds, adapters=[None] * 3)[0], base)
    assert np.array_equal(session.run(None, feeds, adapter="fr")[0], only)
    assert np.array_equal(session.run(None, feeds, adapters=["fr"] * 3)[0], only)


def test_a_batch_of_no_rows_gives_no_rows():
    assert opened(Chain()).run(None, rows(n=0), adapters=[])[0].shape == (0, 3, 5)


def test_an_unknown_name_refuses_the_whole_call_and_says_which_row():
    with pytest.raises(UnknownAdapter, match="row 2: no adapter 'odt' is loaded; nearest is odd"):
        opened(Chain()).run(None, rows(n=3), adapters=["fr", None, "odt"])


def test_another_number_of_rows_than_the_batch_is_refused():
    with pytest.raises(FeedError, match="has 2 entries, and the batch has 3 rows"):
        opened(Chain()).run(None, rows(n=3), adapters=["fr", None])


def test_adapter_and_adapters_together_are_refused():
    with pytest.raises(OptionError, match="not both"):
        opened(Chain()).run(None, rows(n=1), adapter="fr", adapters=["fr"])


def test_more_adapters_in_a_batch_than_max_loras_are_refused():
    session = opened(Chain(), max_loras=2)
    session.run(None, rows(n=2), adapters=["fr", "de"])
    with pytest.raises(OptionError, match="max_loras"):
        session.run(None, rows(n=3), adapters=["fr", "de", "odd"])


def test_an_adapter_above_max_lora_rank_is_refused_at_load():
    with pytest.raises(MismatchError, match="adapter 'odd' has rank 7, and this session takes 6 at most"):
        opened(Chain(), max_lora_rank=6)


def test_external_ports_take_one_adapter_for_the_batch():
    session, feeds = opened(Chain(port="external")), rows(n=2)
    got = session.run(None, feeds, adapters=["fr", "fr"])[0]
    assert np.array_equal(got, session.run(None, feeds, adapter="fr")[0])
    for entries in (["fr", None], ["fr", "de"], [{"fr": 0.5}] * 2):
        with pytest.raises(ModelError, match="make_inputs=True"):
            session.run(None, feeds, adapters=entries)


def test_fixed_ranks_take_one_adapter_and_the_base_in_a_batch():
    chain = Chain(dynamic_rank=False)
    fixed = AdapterSession(chain.model(), {"fr": ADAPTERS["fr"], "it": adapter_of(9)}, session_options=options())
    feeds = rows(n=3)
    got = fixed.run(None, feeds, adapters=["fr", None, {"fr": 0.5}])[0]
    for i, entry in enumerate(["fr", None, {"fr": 0.5}]):
        np.testing.assert_allclose(got[i], alone(chain, feeds["x"][i], entry), **CLOSE)
    with pytest.raises(ModelError, match="dynamic_rank=True"):
        fixed.run(None, feeds, adapters=["fr", None, "it"])


def test_a_site_that_cannot_be_mixed_is_refused_where_an_adapter_touches_it():
    model = with_manifest(Chain(), unmixed={NAMES[0]: "its rows are gathered by 'topk'"})
    session, feeds = AdapterSession(model, ADAPTERS, session_options=options()), rows(n=2)
    assert np.isfinite(session.run(None, feeds, adapters=["head", None])[0]).all()
    session.run(None, feeds, adapters=["fr", "fr"])
    with pytest.raises(ModelError, match=rf"at {NAMES[0]}: its rows are gathered by 'topk'"):
        session.run(None, feeds, adapters=["fr", "de"])


def test_a_row_without_an_adapter_is_refused_where_the_model_has_no_base():
    model = with_manifest(Chain(), required=(NAMES[3],))
    whole = {name: ADAPTERS[name] for name in ("fr", "de")}
    session, feeds = AdapterSession(model, whole, session_options=options()), rows(n=2)
    session.run(None, feeds, adapters=["fr", "de"])
    for entries in (["fr", None], [None, None]):
        with pytest.raises((ModelError, FeedError), match="no base"):
            session.run(None, feeds, adapters=entries)


def test_adapters_beyond_the_limits_run_from_mapped_files():
    chain, feeds = Chain(), rows(n=4)
    session = opened(chain, max_cpu_loras=1, max_cpu_bytes=2000)
    entries = ["fr", "de", "odd", "head"]
    got = session.run(None, feeds, adapters=entries)[0]
    for i, entry in enumerate(entries):
        np.testing.assert_allclose(got[i], alone(chain, feeds["x"][i], entry), **CLOSE)
    assert session.adapters["fr"] == ADAPTERS["fr"]
    assert np.array_equal(session.run(None, feeds, adapter="fr")[0], opened(chain).run(None, feeds, adapter="fr")[0])


def test_an_identity_survives_the_move_into_a_file():
    session = opened(Chain())
    before = {name: session.identity(name) for name in ADAPTERS}
    moved = opened(Chain(), max_cpu_loras=0)
    assert {name: moved.identity(name) for name in ADAPTERS} == before
