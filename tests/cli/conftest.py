"""A small exported model, what extraction made of it, and a way to type commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from adapterx.cli import app
from adapterx.graph.extract import Extraction, extract_adapters
from tests.zoo import Built, build

Type = Callable[..., Result]


@pytest.fixture
def run() -> Type:
    """Types a command; an exception that is no exit, which would be a traceback, is raised."""

    def type_command(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return type_command


@pytest.fixture(scope="session")
def mlp() -> Built:
    return build("ts_mlp")


@pytest.fixture(scope="session")
def nameless() -> Built:
    return build("dy_llama_stripped")


@pytest.fixture(scope="session")
def extraction(mlp: Built, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    return extract_adapters(mlp.model, tmp_path_factory.mktemp("extracted"), make_inputs=True)


@pytest.fixture(scope="session")
def extracted(extraction: Extraction) -> Path:
    return extraction.model_path
