"""PEFT configs that are broken, that cost, that name code, or that mean what we do not do."""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterx.errors import FormatError, UnsupportedAdapter
from adapterx.formats import Limits, load_adapter
from tests.formats.files import matrices, pair, peft_folder


def raw_config(tmp_path: Path, text: str | bytes) -> Path:
    folder = peft_folder(tmp_path / "p")
    (folder / "adapter_config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_the_folder_that_the_others_are_made_from_is_good(tmp_path: Path) -> None:
    a, b = matrices()
    site = load_adapter(peft_folder(tmp_path / "p")).sites["fc"]
    np.testing.assert_array_equal(site.a, a)
    np.testing.assert_array_equal(site.b, b * 2)


def test_a_folder_without_config_is_refused_with_what_is_there(tmp_path: Path) -> None:  # 41
    folder = peft_folder(tmp_path / "p")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"no adapter_config\.json.*there is adapter_model\.safetensors"):
        load_adapter(folder)
    with pytest.raises(FormatError, match="pass the PEFT folder"):
        load_adapter(folder / "adapter_model.safetensors")


def test_a_folder_around_the_right_one_is_refused_with_the_right_one(tmp_path: Path) -> None:  # 41
    folder = peft_folder(tmp_path / "p")
    with pytest.raises(FormatError, match=f"pass {folder}"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("rank", [0, -1, 1e9, 10**9, "8", None, True, 2.0, [2]])
def test_a_rank_that_cannot_be_is_refused(tmp_path: Path, rank: Any) -> None:  # 42
    with pytest.raises(FormatError, match="r: expected a whole number from 1 to 1024"):
        load_adapter(peft_folder(tmp_path / "p", {"r": rank}))


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e308", "1e999", "null", '"4"', "true", "9" * 400])
def test_an_alpha_that_cannot_be_is_refused(tmp_path: Path, alpha: str) -> None:  # 43
    folder = raw_config(tmp_path, f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {alpha}}}')
    with pytest.raises(FormatError, match=r"lora_alpha: expected a number|is not JSON|expected JSON"):
        load_adapter(folder)


def test_all_that_is_wrong_in_a_config_is_told_at_once(tmp_path: Path) -> None:
    config = {"r": 0, "lora_alpha": None, "use_rslora": "yes", "peft_type": 3, "rank_pattern": {"(": 1}}
    with pytest.raises(FormatError, match="5 faults") as caught:
        load_adapter(peft_folder(tmp_path / "p", config))
    assert all(key in str(caught.value) for key in config)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(" * 12 + "a+" + ")+" * 12 + "b"])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_explodes_is_matched_in_bounded_time_or_refused(tmp_path: Path, key: str, pattern: str) -> None:
    a, b = matrices()  # 44: a backtracking engine takes 2^200 steps here
    folder = peft_folder(tmp_path / "p", {key: {pattern: 2}}, **pair(a, b.T, "a" * 200 + "!"))
    with pytest.raises(FormatError, match="too many steps") if "(((" in pattern else contextlib.nullcontext():
        assert load_adapter(folder).ranks == (2,)


def test_a_pattern_outside_the_grammar_is_refused_by_name(tmp_path: Path) -> None:  # 44
    with pytest.raises(FormatError, match=r"rank_pattern\['\(\?<=a\)b'\]: only plain groups"):
        load_adapter(peft_folder(tmp_path / "p", {"rank_pattern": {"(?<=a)b": 2}}))


def test_target_modules_are_never_matched(tmp_path: Path) -> None:  # 45
    for targets in (".*", "(a+)+$", ["m" * 50] * 10_000, 7):
        assert load_adapter(peft_folder(tmp_path / "p", {"target_modules": targets})).ranks == (2,)


def test_patterns_by_the_thousand_are_bounded(tmp_path: Path) -> None:  # 45
    patterns = {f"(x|y)*{i}": 2 for i in range(21_000)}
    with pytest.raises(FormatError, match="rank_pattern: expected an object of at most 20000 patterns"):
        load_adapter(peft_folder(tmp_path / "p", {"rank_pattern": patterns}))


def test_modules_that_a_config_names_are_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # 46
    (tmp_path / "evil_of_config.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "X", "parent_library": "evil_of_config"}
    config = {"auto_mapping": mapping, "megatron_core": "evil_of_config"}
    assert load_adapter(peft_folder(tmp_path / "p", config)).ranks == (2,)
    assert "evil_of_config" not in sys.modules


UNSUPPORTED = {
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 4], [2, 6]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "megatron_config": {"hidden": 1},
    "init_lora_weights": "pissa_niter_16",
    "peft_type": "OFT",
    "key_of_next_year": 1,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_key_that_changes_the_result_is_refused_by_name(tmp_path: Path, key: str) -> None:  # 46, 47
    with pytest.raises(UnsupportedAdapter, match=rf"adapter_config\.json: {key}: "):
        load_adapter(peft_folder(tmp_path / "p", {key: UNSUPPORTED[key]}))


def test_all_keys_that_change_the_result_are_told_at_once(tmp_path: Path) -> None:  # 47
    with pytest.raises(UnsupportedAdapter, match=f"{len(UNSUPPORTED)} faults") as caught:
        load_adapter(peft_folder(tmp_path / "p", UNSUPPORTED))
    assert all(key in str(caught.value) for key in UNSUPPORTED)


@pytest.mark.parametrize("value", [None, False, {}, [], "", 0])
def test_a_key_that_is_switched_off_does_not_matter(tmp_path: Path, value: Any) -> None:  # 47
    config = {"use_dora": value, "modules_to_save": value, "key_of_next_year": value, "rank_pattern": value or None}
    assert load_adapter(peft_folder(tmp_path / "p", config)).ranks == (2,)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_how_training_began_does_not_matter_when_the_base_stayed(tmp_path: Path, start: Any) -> None:
    config = {"init_lora_weights": start, "fan_in_fan_out": True, "lora_dropout": 0.1, "inference_mode": True}
    assert load_adapter(peft_folder(tmp_path / "p", config)).ranks == (2,)


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("fc.lora_magnitude_vector", "use_dora the config does not speak of"),
        ("fc.lora_B.bias", "lora_bias the config does not speak of"),
        ("classifier.weight", "modules_to_save does not name it"),
        ("fc.base_layer.bias", "modules_to_save does not name it"),
        ("fc.lora_E", "peft_type the config does not speak of"),
        ("fc.ia3_l", "peft_type the config does not speak of"),
    ],
)
def test_a_tensor_that_the_config_does_not_speak_of_is_refused_by_name(tmp_path: Path, tensor: str, what: str) -> None:
    a, b = matrices()  # 47
    tensors = {**pair(a, b.T), tensor: np.ones(3, np.float32)}
    with pytest.raises(UnsupportedAdapter, match=rf"base_model\.model\.{tensor}: .*{what}"):
        load_adapter(peft_folder(tmp_path / "p", None, **tensors))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"use_dora": True}, "fc: use_dora is set, but it has no lora_magnitude_vector"),
        ({"peft_type": "ADALORA", "bias": "some"}, "bias: expected one of none"),
        ({"modules_to_save": {"a": 1}}, "modules_to_save: expected a list of module names"),
        ({"use_dora": "yes"}, "use_dora: expected true or false"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_itself_is_refused(tmp_path: Path, config: dict, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        load_adapter(peft_folder(tmp_path / "p", config))


def test_copies_of_base_weights_are_left_out(tmp_path: Path) -> None:
    a, b = matrices()
    tensors = {**pair(a, b.T, "lm_head"), "lm_head.base_layer.weight": np.ones((3, 4), np.float32)}
    assert list(load_adapter(peft_folder(tmp_path / "p", None, **tensors)).sites) == ["lm_head"]


def test_a_config_of_a_megabyte_is_refused(tmp_path: Path) -> None:  # 49
    with pytest.raises(FormatError, match="config of over 1,048,576 is not read"):
        load_adapter(peft_folder(tmp_path / "p", {"revision": "x" * 1_100_000}))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "empty"),
        ("[]", "expected a JSON object"),
        ("{", "expected JSON"),
        (b'{"r": "\xff"}', "not UTF-8"),
        ('{"r": 2, "r": 4}', "'r' is there twice"),
        ('{"loftq_config": ' + '{"a":' * 20 + "1" + "}" * 21, "nested over 16 deep"),
        ('{"loftq_config": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deep"),
    ],
)
def test_a_config_that_is_no_sound_json_is_refused(tmp_path: Path, text: str | bytes, cause: str) -> None:
    with pytest.raises(FormatError, match=cause):
        load_adapter(raw_config(tmp_path, text))


def test_a_tensor_of_another_rank_than_the_config_says_is_refused(tmp_path: Path) -> None:  # 53
    with pytest.raises(FormatError, match=r"fc: its tensors have rank 2, adapter_config\.json says 3"):
        load_adapter(peft_folder(tmp_path / "p", {"rank_pattern": {"f.": 3}}))


def test_scales_follow_the_patterns_first_match_first(tmp_path: Path) -> None:
    a, b = matrices()
    tensors = {**pair(a, b.T, "x.q_proj"), **pair(a, b.T, "x.k_proj"), **pair(a, b.T, "y.q_proj")}
    config = {
        "use_rslora": True,
        "alpha_pattern": {r"x\.(q|v)_proj": 8, "q_proj": 16},
        "r": 9,
        "rank_pattern": {".*": 2},
    }
    sites = load_adapter(peft_folder(tmp_path / "p", config, **tensors)).sites
    scales = {name: float(site.b[0, 0] / b[0, 0]) for name, site in sites.items()}
    expected = {"x.k_proj": 4 / math.sqrt(2), "x.q_proj": 8 / math.sqrt(2), "y.q_proj": 16 / math.sqrt(2)}
    assert scales == pytest.approx(expected)


def test_limits_reach_the_config(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="whole number from 1 to 1,"):
        load_adapter(peft_folder(tmp_path / "p"), limits=Limits(rank=1))
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["r"] == 2
