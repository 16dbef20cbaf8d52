"""What TorchScript makes of containers, and what is undone: each row is a path as it was met in an export."""

from __future__ import annotations

import pytest

from adapterx.graph.paths import Paths
from tests.graph.test_paths import model


@pytest.mark.parametrize(
    ("weights", "path", "name"),
    [
        # An nn.Sequential and its child repeat the container's name.
        (["norm.weight", "net.1.weight"], "m/model/net/net.0", "net.0"),
        (["norm.weight"], "m/model/stages.1/stages.1.0/proj", "stages.1.0.proj"),
        (["norm.weight"], "m/model/net/net.1/net.1.0", "net.1.0"),
        # A module that really holds a list of its own name keeps both.
        (
            ["blocks.blocks.0.norm.weight", "blocks.blocks.1.norm.weight"],
            "m/model/blocks/blocks.0/q",
            "blocks.blocks.0.q",
        ),
        # Containers that are never called leave no trace but in the names of other weights.
        (["heads.a.norm.weight", "heads.b.norm.weight"], "m/model/a/proj", "heads.a.proj"),
        # What onnx.compose puts before every name.
        (["norm.weight"], "enc/m.base_model.model.net.0", "net.0"),
    ],
)
def test_containers_are_named_as_in_the_checkpoint(weights, path, name):
    nodes = [f"/{path}/MatMul", "/m/model/norm/Mul", "/m/model/other/Mul"]
    paths = Paths.of(model([f"m.base_model.model.{weight}" for weight in weights], nodes))
    assert paths.canonical(path) == name
