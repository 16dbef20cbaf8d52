"""``run --rows``: adapters by name, and what each row of the batch gets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from adapterx.cli.rows import named, parsed
from adapterx.errors import OptionError
from tests.cli.conftest import Type
from tests.zoo import Built


def outputs(run: Type, folder: Path, *arguments: object) -> np.ndarray:
    result = run("run", *arguments, "--output", folder / "out.npz")
    assert result.exit_code == 0, result.stderr
    with np.load(folder / "out.npz") as stored:
        return stored[stored.files[0]]


@pytest.fixture
def feeds(mlp: Built, tmp_path: Path) -> Path:
    x = mlp.feeds["x"]
    np.savez(tmp_path / "feeds.npz", x=np.concatenate([x, x[:1]] if len(x) == 2 else [x[:3]]))
    return tmp_path / "feeds.npz"


def given(mlp: Built) -> tuple[object, ...]:
    return "--adapter", f"fr={mlp.adapters['b']}", "--adapter", mlp.adapters["c"]


def test_each_row_gets_what_it_gets_when_all_have_its_adapter(
    run: Type, mlp: Built, extracted: Path, feeds: Path, tmp_path: Path
) -> None:
    common = (extracted, "--feeds", feeds)
    mixed = outputs(run, tmp_path, *common, *given(mlp), "--rows", "-,fr,c")
    alone = [outputs(run, tmp_path, *common, *more) for more in ((), given(mlp)[:2], given(mlp)[2:])]
    for i, whole in enumerate(alone):
        np.testing.assert_allclose(mixed[i], whole[i], rtol=1e-5, atol=1e-5)
    assert np.abs(alone[1] - alone[2]).max() > 0.1


def test_a_weighted_row_lies_where_its_weights_say(
    run: Type, mlp: Built, extracted: Path, feeds: Path, tmp_path: Path
) -> None:
    got = outputs(run, tmp_path, extracted, "--feeds", feeds, *given(mlp), "--rows", "fr=1+c=0,fr,fr=0")
    base = outputs(run, tmp_path, extracted, "--feeds", feeds)
    fr = outputs(run, tmp_path, extracted, "--feeds", feeds, *given(mlp)[:2])
    np.testing.assert_allclose(got[:2], fr[:2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2], base[2], rtol=1e-5, atol=1e-5)


def test_without_feeds_there_are_as_many_rows_as_are_named(run: Type, mlp: Built, extracted: Path) -> None:
    told = json.loads(run("run", extracted, *given(mlp), "--rows", "fr,-,fr=0.7+c=0.3,c", "--json").stdout)
    assert told["inputs"][0]["shape"] == [4, 40]
    assert told["rows"] == ["fr", None, {"fr": 0.7, "c": 0.3}, "c"]
    assert set(told["adapters"]) == {"fr", "c"}
    assert told["adapter"] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("fr,odt,-", "UnknownAdapter: row 1: no adapter 'odt' is loaded"),
        ("fr,-", "FeedError: --rows has 2 entries, and the batch has 3 rows"),
        ("fr,-", "give one entry a row, - for the base"),
        ("fr,,-", "row 1: expected a name, - for the base, or fr=0.7+de=0.3; got '', a name missing"),
        ("fr,fr=0.5+fr=0.5,-", "got 'fr=0.5+fr=0.5', 'fr' twice"),
        ("fr,fr=much,-", "row 1: the weight of 'fr' must be a number; got 'much'"),
        ("fr,fr=nan,-", "row 1: the weight of 'fr' must be a finite number"),
    ],
)
def test_rows_that_do_not_fit_are_refused_in_words_that_can_be_typed(
    run: Type, mlp: Built, extracted: Path, feeds: Path, rows: str, message: str
) -> None:
    result = run("run", extracted, "--feeds", feeds, *given(mlp), "--rows", rows)
    assert result.exit_code == 1
    assert message in result.stderr


def test_several_adapters_and_no_rows_are_refused(run: Type, mlp: Built, extracted: Path) -> None:
    result = run("run", extracted, *given(mlp))
    assert result.exit_code == 1
    assert "2 adapters (fr, c) and no --rows" in result.stderr


def test_two_files_of_one_name_are_refused_until_they_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"two adapters are called 'fr': a/fr\.npz and b/fr\.npz; name them"):
        named(["a/fr.npz", "b/fr.npz"])
    assert named(["a/fr.npz", "de=b/fr.npz"]) == {"fr": Path("a/fr.npz"), "de": Path("b/fr.npz")}


def test_a_sign_in_the_name_of_a_file_that_is_there_names_nothing(mlp: Built, tmp_path: Path) -> None:
    path = shutil.copytree(mlp.adapters["b"], tmp_path / "lr=3")
    assert named([str(path)]) == {"lr-3": path}


def test_what_stands_for_the_base_is_no_name() -> None:
    assert parsed("-,fr-1,a+b=-0.5") == [None, "fr-1", {"a": 1.0, "b": -0.5}]
