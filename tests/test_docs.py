"""What the documents say must still be so."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from adapterx.ops import low_rank_add, low_rank_add_function, row_vector, row_vector_function

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_of_this_repository(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_targets_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    paths = re.findall(r"`((?:adapterx|bench|tests|docs|samples)/[\w./-]+?)`", text)
    targets = re.findall(r"^\s+make (\w+)", text, re.MULTILINE)
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert set(targets) <= set(known)


def function_of_the_page(name: str = "LowRankAdd") -> onnx.FunctionProto:
    page = (ROOT / "docs" / "ops.md").read_text()
    texts = re.findall(r"```\n(<domain.*?)```", page, re.DOTALL)
    (function,) = [one for one in map(onnx.parser.parse_function, texts) if one.name == name]
    return function


def run_function(function: onnx.FunctionProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    node = onnx.helper.make_node(function.name, list(feeds), ["y"], domain="ai.adapterx")
    inputs = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, feeds[name].shape) for name in feeds]
    outputs = [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("ai.adapterx", 1)]
    graph = onnx.helper.make_graph([node], "g", inputs, outputs)
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets)
    (y,) = ReferenceEvaluator(model).run(None, feeds)
    return y


def random_feeds(rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rank)
    shapes = {"base": (2, 5, 4), "x": (2, 5, 6), "a": (rank, 6), "b": (rank, 4), "mask": (2, 1, rank)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


FUNCTIONS = {"page": function_of_the_page, "code": lambda: ir.to_proto(low_rank_add_function(18))}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_function_on_the_page_and_the_one_in_the_code_give_what_numpy_gives(function) -> None:
    feeds = random_feeds(3)
    np.testing.assert_allclose(run_function(function(), feeds), low_rank_add(*feeds.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_rank_0_gives_the_base_bit_for_bit(function) -> None:
    feeds = random_feeds(0)
    np.testing.assert_array_equal(run_function(function(), feeds), feeds["base"])


PICKS = {"page": lambda: function_of_the_page("RowVector"), "code": lambda: ir.to_proto(row_vector_function(18))}


@pytest.mark.parametrize("mask", [np.ones((1, 1)), np.ones((4, 1)) / 2, np.eye(4, 3), np.eye(3)[:, None]], ids=np.shape)
@pytest.mark.parametrize("function", PICKS.values(), ids=PICKS)
def test_each_row_picks_of_the_vectors_what_numpy_picks(function, mask) -> None:
    feeds = {"vectors": np.random.default_rng(0).standard_normal((3, 5)), "mask": mask}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    np.testing.assert_allclose(run_function(function(), feeds), row_vector(*feeds.values()), rtol=1e-6)


@pytest.mark.parametrize("function", PICKS.values(), ids=PICKS)
def test_of_no_vectors_each_row_picks_zeros(function) -> None:
    feeds = {"vectors": np.zeros((0, 5), np.float32), "mask": np.ones((1, 1), np.float32)}
    np.testing.assert_array_equal(run_function(function(), feeds), np.zeros((1, 5), np.float32))


def test_the_nodes_that_the_page_puts_before_those_of_codes_and_of_other_floats_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "ops.md").read_text()
    codes = ir.to_proto(low_rank_add_function(18, activations=ir.DataType.FLOAT, codes=True))
    floats = ir.to_proto(low_rank_add_function(18, activations=ir.DataType.FLOAT))
    for function, names in ((codes, ("a_codes", "a_column", "a_scale", "a_values")), (floats, ("a_cast",))):
        nodes = {node.output[0]: node for node in function.node}
        for name in names:
            (op_type, inputs) = re.findall(rf"\b{name} = (\w+)(?: <[^>]*>)? \((.*?)\)", page)[0]
            assert (nodes[name].op_type, ", ".join(nodes[name].input)) == (op_type, inputs)
