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
CLOSE = 1e-5
# Activations are put on a grid that all rows of a batch share, so that a row's company moves it.
GRIDS = {"int8_dynamic", "int8_static"}


def takes_part(case):
    return case.lora and case.runs_on_ort and not case.negative and not case.unsupported and case.quantized not in GRIDS


PARTS = [name for name, case in CASES.items() if takes_part(case) or (case.source and takes_part(CASES[case.source]))]
PARTS = [name for name in PARTS if not CASES[name].unsupported and CASES[name].quantized not in GRIDS]


class Mixed:
    """An extracted model, three random adapters for it, and one batch."""

    def __init__(self, name, folder):
        built = build(name)
        exported = built.adapters["a"] if CASES[name].kind == "bias" else exported_adapter(name, built)
        path = extract_adapters(built.model, folder, make_inputs=True, adapter=exported).model_path
        self.model = ir.load(path)
        self.manifest = Manifest.loads(self.model.metadata_props[KEY], where=name)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(path, options)
        self.inputs = {value.name: value for value in self.model.graph.inputs}
        rng = np.random.default_rng(3)
        self.adapters = [self._adapter(rng, rank) for rank in RANKS]

    def _adapter(self, rng, rank):
        """Of ``rank`` at every site but the unmixed ones, where all three have the same."""
        arrays = {}
        for site in self.manifest.sites:
            same = site.name in self.manifest.unmixed
            for port in site.ports:
                name = tensor_name(site.name, port)
                stated = self.inputs[name].shape[0]
                rows = stated if isinstance(stated, int) else 1 if port in VECTORS else 2 if same else rank
                source = np.random.default_rng(7) if same else rng
                array = source.standard_normal((rows, *site.width(port))) * 0.3
                arrays[name] = array.astype(self.inputs[name].dtype.numpy())
        return arrays

    def run(self, feeds):
        outputs = self.session.run(None, {name: self._value(name, array) for name, array in feeds.items()})
        return [np.asarray(output, np.float32) for output in outputs]

    def _value(self, name, array):
        return array.astype(self.inputs[name].dtype.numpy()) if name in self.inputs else array

    def alone(self, feeds, index):
        return self.run({**feeds, **({} if index is None else self.adapters[index])})

    def mixed(self, feeds, picks):
        """Adapters side by side where sites tell rows apart, and masks that pick."""
        fixed = {tensor_name(s.name, port) for s in self.manifest.sites for port in s.ports if s.name in self.manifest.unmixed}
        bank = {
            name: one if name in fixed else np.concatenate([adapter[name] for adapter in self.adapters])
            for name, one in self.adapters[0].items()
        }
        rows = np.array([[float(pick == i) for i in range(len(RANKS))] for pick in picks], np.float32)
        masks = {self.manifest.mask: np.repeat(rows, RANKS, axis=1), self.manifest.row_mask: rows}
        return self.run({**feeds, **bank, **{name: mask for name, mask in masks.items() if name}})


def close(case):
    return CLOSE if case.dtype == "float32" and "float16" not in case.post and not case.lora.half else 2e-2


@pytest.mark.parametrize("name", PARTS)
def test_every_row_of_a_mixed_batch_is_that_row_with_its_adapter(name, tmp_path):
    mixed = Mixed(name, tmp_path)
    print("STAT", name, mixed.manifest.batch, len(mixed.manifest.sites), dict(mixed.manifest.unmixed))
    for picks, length in (((2, 0, 1), 4), ((1, 2, 1), 3)):
        feeds = example_feeds(mixed.model, manifest=mixed.manifest, rows=len(picks), length=length)
        feeds.pop("adapter_row_mask", None)
        assert {len(feeds[one]) for one in mixed.manifest.batch} == {len(picks)}
        wanted = [mixed.alone(feeds, pick) for pick in picks]
        got = mixed.mixed(feeds, picks)
        told = False
        for index, output in enumerate(got):
            assert output.shape == wanted[0][index].shape, mixed.session.get_outputs()[index].name
            if len(output) != len(picks):
                continue
            largest = max(np.abs(one[index]).max() for one in wanted)
            for row, want in enumerate(wanted):
                error = np.abs(output[row] - want[index][row]).max(initial=0)
                assert error <= 1e-5 * largest, f"{mixed.session.get_outputs()[index].name}, row {row}: {error:.1e} of {largest:.1e}"
            told = told or any(np.abs(wanted[0][index] - one[index]).max() > 1e-2 * largest for one in wanted[1:])
        assert told, "adapters that do the same prove nothing"
