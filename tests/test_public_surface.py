"""What users may rely on: these names, and nothing that looks like one of them by accident."""

import importlib
import inspect

import pytest

import adapterx as ax
from adapterx import errors

VERBS = {
    "find_sites",
    "inject_adapters",
    "merge_adapter",
    "merge_peft",
    "unmerge_adapter",
    "extract_adapters",
    "load_adapter",
    "save_adapter",
    "convert_adapter",
    "combine",
    "quantize_base",
    "verify_extraction",
    "verify_mixed",
}
NOUNS = {
    *("Adapter", "LowRank", "AdapterSession", "AdapterSite"),
    *("Extraction", "Injection", "Merge", "Quantization", "Verification"),
}
ERRORS = {
    "AdapterxError",
    "FeedError",
    "FormatError",
    "MismatchError",
    "MissingDependency",
    "ModelError",
    "NoAdaptersFound",
    "OptionError",
    "UnknownAdapter",
    "UnsupportedAdapter",
    "UnsupportedQuantization",
}


def test_the_public_names_are_these() -> None:
    assert sorted(ax.__all__) == sorted(VERBS | NOUNS | ERRORS | {"errors", "__version__"})
    assert sorted(ax.__all__) == dir(ax)


@pytest.mark.parametrize("name", sorted(VERBS | NOUNS | ERRORS))
def test_each_name_leads_to_what_it_says(name: str) -> None:
    found = getattr(ax, name)
    assert found.__name__ == name
    assert inspect.isfunction(found) == (name in VERBS)
    assert inspect.getdoc(found)


def test_every_error_is_reachable_by_name_and_through_errors_and_is_caught_by_the_root() -> None:
    raised = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert set(raised) == ERRORS
    for name, kind in raised.items():
        assert getattr(ax, name) is kind is getattr(ax.errors, name)
        assert issubclass(kind, ax.AdapterxError)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="extract_adapter'"):
        ax.extract_adapter  # noqa: B018 - looking it up is the test
    assert not hasattr(ax, "torch")


def keyword_only(function: object) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


@pytest.mark.parametrize(
    ("name", "positional", "keywords"),
    [
        ("find_sites", ["model"], set()),
        (
            "extract_adapters",
            ["model", "output_dir"],
            {"make_inputs", "pack_inputs", "dynamic_rank", "optional_inputs", "adapter_format"},
        ),
        ("load_adapter", ["path"], set()),
        ("save_adapter", ["adapter", "path"], set()),
        ("AdapterSession", ["model", "adapters"], {"providers", "session_options"}),
        ("AdapterSession.run", ["self", "output_names", "feeds"], {"adapter"}),
    ],
)
def test_calls_keep_the_order_and_the_options_that_are_promised(
    name: str, positional: list[str], keywords: set[str]
) -> None:
    found = ax
    for part in name.split("."):
        found = getattr(found, part)
    assert list(inspect.signature(found).parameters)[: len(positional)] == positional
    assert keywords <= set(keyword_only(found))


def test_the_version_is_that_of_the_distribution() -> None:
    assert ax.__version__ == importlib.metadata.version("adapterx")
