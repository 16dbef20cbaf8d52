"""The zoo in mixed batches: each row of a batch gives what it gives where every row has its adapter."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adapterx.adapter import tensor_name
from adapterx.graph.example_feeds import example_feeds
from adapterx.graph.extract import extract_adapters
from adapterx.manifest import KEY, Manifest
from adapterx.site import VECTORS
from tests.graph.test_zoo import exported_adapter
from tests.zoo import CASES, build

RANKS = (2, 3, 1)
PROMPTS = {"prompt", "prefix"}
# Relative to the largest output: rows compared, and adapters told apart.
CLOSE, APART = 1e-5, 1e-2
# Activations are put on a grid that all rows of a batch share, so that a row's company moves it.
GRIDS = {"int8_dynamic", "int8_static"}


def made_from(case):
    while case.source:
        case = CASES[case.source]
    return case


def takes_part(case):
    of_floats = case.quantized not in GRIDS and case.kind not in PROMPTS
    return bool(made_from(case).lora) and case.runs_on_ort and of_floats and not (case.negative or case.unsupported)


PARTS = [name for name, case in CASES.items() if takes_part(case)]
PROMPTED = [name for name, case in CASES.items() if case.kind in PROMPTS]


def extracted(name, folder, **options):
    built = build(name)
    exported = built.adapters["a"] if CASES[name].kind == "bias" else exported_adapter(name, built)
    path = extract_adapters(built.model, folder, adapter=exported, **options).model_path
    model = ir.load(path)
    return path, model, Manifest.loads(model.metadata_props[KEY], where=name)


class Mixed:
    """An extracted model, three random adapters for it, and one batch."""

    def __init__(self, name, folder):
        self.name = name
        path, self.model, self.manifest = extracted(name, folder, make_inputs=True)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(path, options)
        self.inputs = {value.name: value for value in self.model.graph.inputs}
        rng = np.random.default_rng(3)
        self.adapters = [self._adapter(rng, rank) for rank in RANKS]

    def _adapter(self, rng, rank):
        arrays = {}
        for site in self.manifest.sites:
            for port in site.ports:
                name = tensor_name(site.name, port)
                array = rng.standard_normal((1 if port in VECTORS else rank, *site.width(port))) * 0.3
                arrays[name] = array.astype(self.inputs[name].dtype.numpy())
        return arrays

    def feeds(self, rows, length):
        if not CASES[self.name].export.startswith("genai"):
            made = example_feeds(self.model, manifest=self.manifest, rows=rows, length=length)
            return {name: array for name, array in made.items() if name != self.manifest.row_mask}
        # Its model says nothing of the width of a cache.
        stored = {name: array[np.arange(rows) % len(array)] for name, array in build(self.name).feeds.items()}
        return {name: array[:, :length] if array.ndim == 2 else array for name, array in stored.items()}

    def run(self, feeds):
        outputs = self.session.run(None, {name: self._value(name, array) for name, array in feeds.items()})
        return [np.asarray(output, np.float32) for output in outputs]

    def _value(self, name, array):
        return array.astype(self.inputs[name].dtype.numpy()) if name in self.inputs else array

    def mixed(self, feeds, picks):
        """Adapters side by side, and masks that pick."""
        bank = {name: np.concatenate([one[name] for one in self.adapters]) for name in self.adapters[0]}
        rows = np.array([[float(pick == i) for i in range(len(RANKS))] for pick in picks], np.float32)
        masks = {self.manifest.mask: np.repeat(rows, RANKS, axis=1), self.manifest.row_mask: rows}
        return self.run({**feeds, **bank, **{name: mask for name, mask in masks.items() if name}})


@pytest.mark.parametrize("name", PARTS)
def test_every_row_of_a_mixed_batch_is_that_row_with_its_adapter(name, tmp_path):
    mixed = Mixed(name, tmp_path)
    assert not mixed.manifest.unmixed
    for picks, length in (((2, 0, 1), 4), ((1, 2, 1), 3)):
        feeds = mixed.feeds(len(picks), length)
        assert {len(feeds[one]) for one in mixed.manifest.batch} == {len(picks)}
        wanted = [mixed.run({**feeds, **mixed.adapters[pick]}) for pick in picks]
        told = []
        for index, (output, *alone) in enumerate(zip(mixed.mixed(feeds, picks), *wanted, strict=True)):
            assert output.shape == alone[0].shape
            if len(output) == len(picks):
                largest = max(np.abs(one).max() for one in alone)
                errors = [np.abs(output[row] - one[row]).max(initial=0) for row, one in enumerate(alone)]
                assert max(errors) <= CLOSE * largest, (mixed.session.get_outputs()[index].name, errors, largest)
                told.append(np.abs(alone[0] - alone[1]).max() > APART * largest)
        assert any(told), "adapters that do the same prove nothing"


@pytest.mark.parametrize("name", PROMPTED)
def test_a_prompt_is_one_for_all_rows_and_the_model_says_so(name, tmp_path):
    unmixed = extracted(name, tmp_path, make_inputs=True)[2].unmixed
    assert unmixed == {"prompt_encoder": "its prompt is one constant, which all rows of a batch share"}


def test_every_input_that_brings_rows_is_named_and_no_other(tmp_path):
    manifest = extracted("optimum_t5_merged_next", tmp_path, make_inputs=True)[2]
    past = [
        f"past_key_values.{i}.{p}.{kv}" for i in range(2) for p in ("decoder", "encoder") for kv in ("key", "value")
    ]
    assert "use_cache_branch" in build("optimum_t5_merged_next").feeds
    assert manifest.batch == ("encoder_attention_mask", "input_ids", "encoder_hidden_states", *past)


def test_external_adapters_are_one_for_the_whole_batch_and_nothing_is_said_of_rows(tmp_path):
    manifest = extracted("ts_mlp", tmp_path)[2]
    assert (manifest.batch, manifest.unmixed) == ((), {})
