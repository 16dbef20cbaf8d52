"""Does this adapter belong to this model?"""

import dataclasses
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError
from adapterx.runtime.fit import fit, fitted
from adapterx.runtime.session import AdapterSession
from adapterx.site import AdapterSite, SiteTable
from tests.runtime.chain import LAYERS, NAMES, RANK, Chain, adapter_of, rows


def site(name: str, d_in: int = 8, d_out: int = 8, dtype: str = "float32", rank: int = 4) -> AdapterSite:
    return AdapterSite(name, "default", "lora", "MatMul", d_in, d_out, rank, 1.0, dtype, "initializer", name)


def change(d_in: int = 8, d_out: int = 8, rank: int = 2, *, value: float = 1.0, dtype: object = "f4") -> LowRank:
    return LowRank(a=np.full((rank, d_in), value, dtype), b=np.full((rank, d_out), value, dtype))


def faults(adapter: Adapter, *sites: AdapterSite, **options: bool) -> list[str]:
    with pytest.raises(MismatchError) as caught:
        fitted(adapter, sites, name="fr", **options)
    return str(caught.value).splitlines()


def test_an_adapter_that_fits_comes_back_as_it_is():
    adapter = adapter_of()
    assert fit(adapter, Chain().manifest(), name="it") is adapter


def test_all_faults_are_told_at_once_with_both_shapes_and_the_nearest_site():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    adapter = Adapter(
        {
            names[0]: change(2048, 2048, 16),
            names[1]: change(2048, 2048, 16),
            "model.layers.0.attn.q_proj": change(2048, 2048, 16),
        }
    )
    assert faults(adapter, site(names[0], 2048, 2048), site(names[1], 2048, 512)) == [
        "adapter 'fr' does not fit this model at 2 of 3 sites:",
        "  model.layers.0.attn.q_proj: no such site; nearest is model.layers.0.self_attn.q_proj",
        "  model.layers.0.self_attn.v_proj: adapter is (16, 2048) -> 2048, model is 2048 -> 512",
        "Export both from one checkpoint. `adapterx sites model.onnx` lists the model's.",
    ]


def test_a_change_that_fits_only_when_turned_is_refused_with_a_hint():
    assert "only the transpose fits" in faults(Adapter({"m": change(8, 5)}), site("m", 5, 8))[1]
    assert "only the transpose fits" in faults(Adapter({"m": change(2, 2, 8)}), site("m", 8, 8))[1]
    assert "transpose" not in faults(Adapter({"m": change(8, 5)}), site("m", 8, 6))[1]


def test_a_rank_above_a_fixed_port_is_refused_and_one_below_is_taken():
    low, high = Adapter({"m": change(rank=3)}), Adapter({"m": change(rank=5)})
    assert fitted(low, [site("m")], fixed_rank=True) is low
    assert fitted(high, [site("m")]) is high
    assert "rank 5, the model's port takes 4" in faults(high, site("m"), fixed_rank=True)[1]


@pytest.mark.parametrize(("port", "fits"), [("input", False), ("packed", False), ("external", True)])
def test_only_inputs_can_have_a_fixed_rank(port, fits):
    manifest, adapter = Chain(port=port, dynamic_rank=False).manifest(), adapter_of(rank=RANK + 1)
    if fits:
        assert fit(adapter, manifest, name="it") is adapter
    else:
        with pytest.raises(MismatchError, match="port takes 3"):
            fit(adapter, manifest, name="it")


def test_an_adapter_for_another_base_is_refused_unless_that_is_allowed():
    other = Adapter(dict(adapter_of().sites), {"base_fingerprint": "0" * 64})
    with pytest.raises(MismatchError, match=r"(?s)fit this model:\n  base: .*fingerprint '0000.*model is 'ffff"):
        AdapterSession(Chain().model(), {"it": other})
    AdapterSession(Chain().model(), {"it": other}, allow_other_base=True).run(None, rows(), adapter="it")
    for known, fingerprint in [("f" * 64, "f" * 64), ("0" * 64, ""), ("", "f" * 64)]:
        adapter = Adapter(dict(other.sites), {"base_fingerprint": known})
        assert fit(adapter, Chain(fingerprint=fingerprint).manifest(), name="it") is adapter


def test_a_fingerprint_over_fewer_sites_than_the_models_is_not_compared():
    first = dict([next(iter(adapter_of().sites.items()))])
    adapter = Adapter(first, {"base_fingerprint": "0" * 64, "model_version": "7"})
    assert fit(adapter, Chain().manifest(), name="it") is adapter


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"model_version": "7"}, "made for version '7'"),
        ({"base_model": "acme/other-1b"}, "made for name 'other-1b', model is 'llama-1b'"),
    ],
)
def test_a_version_or_a_base_models_name_that_differs_is_refused_unless_that_is_allowed(metadata, told):
    adapter = Adapter(dict(adapter_of().sites), metadata)
    manifest = dataclasses.replace(Chain().manifest(), base_model="meta/llama-1b")
    with pytest.raises(MismatchError, match=told):
        fit(adapter, manifest, name="it")
    assert fit(adapter, manifest, name="it", allow_other_base=True) is adapter


def test_a_base_that_lay_in_another_folder_is_the_same_base():
    adapter = Adapter(dict(adapter_of().sites), {"base_model": "checkpoints/llama-1b/"})
    manifest = dataclasses.replace(Chain().manifest(), base_model="meta/llama-1b")
    assert fit(adapter, manifest, name="it") is adapter


def test_sites_without_names_are_matched_by_shape_where_each_shape_occurs_once():
    def unnamed_sites(*widths):
        named = (site(f"structural.{i}", d_out=d_out) for i, d_out in enumerate(widths))
        return [dataclasses.replace(one, name_source="structure") for one in named]

    unnamed = unnamed_sites(2, 3)
    taken = fitted(Adapter({"model.b": change(d_out=3), "model.a": change(d_out=2)}), unnamed)
    assert {name: one.d_out for name, one in taken.sites.items()} == {"structural.0": 2, "structural.1": 3}
    with pytest.raises(MismatchError, match="several have one shape"):
        fitted(Adapter({"model.a": change(d_out=2)}), unnamed_sites(2, 2))


def test_sites_that_lie_in_another_file_of_the_export_are_passed_over():
    adapter = Adapter({**adapter_of().sites, "encoder.q": change()})
    manifest = dataclasses.replace(Chain().manifest(), elsewhere=("encoder.q",))
    assert fit(adapter, manifest, name="it") == adapter_of()
    with pytest.raises(MismatchError, match=r"encoder\.q: no such site"):
        fit(adapter, Chain().manifest(), name="it")


def test_the_fault_of_the_base_is_told_together_with_those_of_the_sites():
    other = Adapter({**adapter_of().sites, "odd": change()}, {"base_fingerprint": "0" * 64})
    with pytest.raises(MismatchError, match=r"(?s)at 1 of 5 sites:\n  base: .*  odd: no such site"):
        fit(other, Chain().manifest(), name="it")


@pytest.mark.parametrize("given_dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_wider_is_silent_and_exact(given_dtype):
    low_rank = change(value=1.5, dtype=getattr(ml_dtypes, given_dtype, given_dtype))
    taken = fitted(Adapter({"m": low_rank}), [site("m")]).sites["m"]
    assert taken.dtype == np.float32
    assert np.array_equal(taken.a, low_rank.a.astype(np.float32))


@pytest.mark.parametrize(
    ("given_dtype", "value", "dtype"),
    [("float32", 1e5, "float16"), (ml_dtypes.bfloat16, 1e5, "float16"), ("float64", 1e39, "float32")],
)
def test_narrower_is_refused_exactly_when_something_finite_becomes_infinite(given_dtype, value, dtype):
    (_, line, _) = faults(Adapter({"m": change(value=value, dtype=given_dtype)}), site("m", dtype=dtype))
    assert f"become infinite in the model's {dtype}" in line
    fitting = fitted(Adapter({"m": change(value=2.0, dtype=given_dtype)}), [site("m", dtype=dtype)])
    assert fitting.sites["m"].dtype.name == dtype
    infinite = Adapter({"m": change(value=np.inf, dtype=given_dtype)})
    assert np.isinf(fitted(infinite, [site("m", dtype=dtype)]).sites["m"].a).all()


def test_integers_are_no_weights():
    assert "adapter is int8, model takes float32" in faults(Adapter({"m": change(dtype="i1")}), site("m"))[1]


def test_one_prefix_for_all_names_is_taken_off_or_added():
    sites = [site(f"encoder.layer.{i}.q") for i in range(3)]
    for prefix in ("model.", "base.model."):
        longer = Adapter({f"{prefix}encoder.layer.{i}.q": change() for i in range(3)})
        assert list(fitted(longer, sites).sites) == [s.name for s in sites]
    shorter = Adapter({f"layer.{i}.q": change() for i in range(3)})
    assert list(fitted(shorter, sites).sites) == [s.name for s in sites]


def test_no_prefix_is_guessed_when_two_fit_equally_or_one_name_fits_as_it_is():
    towers = [site(f"{tower}.layer.0.q") for tower in ("text", "vision")]
    assert "no such site" in faults(Adapter({"layer.0.q": change()}), *towers)[1]
    mixed = Adapter({"text.layer.0.q": change(), "m.vision.layer.0.q": change()})
    assert "m.vision.layer.0.q: no such site; nearest is vision.layer.0.q" in faults(mixed, *towers)[1]


def test_under_a_prefix_only_the_names_that_do_not_fit_are_faults():
    sites = [site(f"layer.{i}.q") for i in range(3)]
    adapter = Adapter({f"model.layer.{i}.q": change() for i in range(4)})
    head, line, _ = faults(adapter, *sites)
    assert "at 1 of 4 sites" in head
    assert "model.layer.3.q: no such site" in line


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_a_fused_adapter_over_parts_equals_the_fused_product(rank, d_q, d_kv, prefixed):
    rng = np.random.default_rng(0)
    low_rank = LowRank(a=rng.standard_normal((rank, 8)), b=rng.standard_normal((rank, d_q + 2 * d_kv)))
    parts = [site("m.q_proj", 8, d_q), site("m.k_proj", 8, d_kv), site("m.v_proj", 8, d_kv)]
    adapter = Adapter({f"{'base.' if prefixed else ''}m.qkv_proj": low_rank})
    taken = fitted(adapter, [site(s.name, 8, s.d_out, "float64") for s in parts]).sites
    assert set(taken) == {s.name for s in parts}
    pieces = [taken[s.name].b.T @ taken[s.name].a for s in parts]
    assert np.array_equal(np.concatenate([p.b for p in (taken[s.name] for s in parts)], axis=1), low_rank.b)
    np.testing.assert_allclose(np.concatenate(pieces), low_rank.b.T @ low_rank.a)
    assert all(taken[s.name].a is low_rank.a for s in parts)


def test_gate_up_is_split_and_a_wrong_sum_or_a_part_given_twice_is_refused():
    parts = [site("m.gate_proj", 8, 3), site("m.up_proj", 8, 4)]
    assert set(fitted(Adapter({"m.gate_up_proj": change(8, 7)}), parts).sites) == {"m.gate_proj", "m.up_proj"}
    assert "-> 6, model is 8 -> 7 (3 + 4)" in faults(Adapter({"m.gate_up_proj": change(8, 6)}), *parts)[1]
    twice = Adapter({"m.gate_proj": change(8, 3), "m.gate_up_proj": change(8, 7)})
    assert "m.gate_up_proj: m.gate_proj is given twice" in faults(twice, *parts)[1]


def test_a_model_that_kept_the_fused_layer_takes_the_fused_adapter_as_it_is():
    adapter = Adapter({"m.qkv_proj": change(8, 24)})
    assert fitted(adapter, [site("m.qkv_proj", 8, 24), site("m.q_proj"), site("m.k_proj"), site("m.v_proj")]) is adapter


def test_several_adapters_at_one_place_are_one_site():
    adapter = Adapter({"m": change()})
    assert fitted(adapter, SiteTable([site("m"), site("m")])) is adapter


@pytest.mark.parametrize("prefix", ["", "base."])
def test_an_adapter_of_parts_over_a_fused_layer_is_one_change_of_it(prefix):
    q, v = change(8, 8, rank=2), change(8, 4, rank=3)
    adapter = Adapter({f"{prefix}m.q_proj": q, f"{prefix}m.v_proj": v})
    whole = fitted(adapter, [site("m.qkv_proj", 8, 16)]).sites["m.qkv_proj"]
    np.testing.assert_array_equal(whole.b.T @ whole.a, np.concatenate([q.b.T @ q.a, np.zeros((4, 8)), v.b.T @ v.a]))
    with pytest.raises(MismatchError, match=r"m\.qkv_proj: widths of the parts must add up to 24"):
        fitted(adapter, [site("m.qkv_proj", 8, 24)])
    with pytest.raises(MismatchError, match="rank 5, the model's port takes 4"):
        fitted(adapter, [site("m.qkv_proj", 8, 16)], fixed_rank=True)


def test_twenty_thousand_wrong_names_are_refused_in_a_readable_message_and_soon():
    low_rank = change()
    adapter = Adapter({f"model.layers.{i}.mlp.wrong_proj": low_rank for i in range(20_000)})
    start = time.perf_counter()
    lines = faults(adapter, *(site(f"model.layers.{i}.mlp.down_proj") for i in range(200)))
    assert time.perf_counter() - start < 5
    assert len(lines) == 53
    assert "and 19950 more" in lines[-2]


def test_names_that_a_terminal_would_act_on_are_shown_escaped():
    assert "'m\\x1b[2J': no such site" in faults(Adapter({"m\x1b[2J": change()}), site("m"))[1]


def test_fitting_copies_nothing_that_needs_no_cast():
    renamed = Adapter({f"wrapper.{name}": low_rank for name, low_rank in adapter_of().sites.items()})
    taken = fit(renamed, Chain().manifest(), name="it")
    assert all(taken.sites[name] is renamed.sites[f"wrapper.{name}"] for name in NAMES)
    assert len(taken.sites) == len(LAYERS)
