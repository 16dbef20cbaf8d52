"""What holds for the whole tree; architecture.py says how each law is checked."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import architecture as laws

ROOT = Path(__file__).resolve().parents[1]
LAWS = [
    laws.imports_that_point_up,
    laws.import_cycles,
    laws.long_files,
    laws.nounless_names,
    laws.prints,
    laws.machine_paths,
]
Law = Callable[[Path], list[str]]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_tree_has_no(law: Law) -> None:
    assert not law(ROOT)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SOUND = {
    "adapterx/__init__.py": "from adapterx.runtime.session import run\n",
    "adapterx/cli.py": "def main():\n    import adapterx.graph.find as find\n    print(find)\n",
    "adapterx/errors.py": "",
    "adapterx/adapter.py": "from adapterx.errors import Bad\n",
    "adapterx/formats/__init__.py": "from adapterx.formats.npz import read\n",
    "adapterx/formats/npz.py": "from ..adapter import Adapter\nfrom adapterx import errors\n",
    "adapterx/graph/find.py": "import adapterx.formats\nimport onnx\n",
    "adapterx/runtime/session.py": "import typing as t\nif t.TYPE_CHECKING:\n    import adapterx.graph.find\n",
    "tests/test_x.py": "where = '/etc/hosts'\n",
    "README.md": "/usr/share/common-licenses, ~/work/x and https://host/home/page\n",
}
BROKEN = {
    "runtime to graph": (laws.imports_that_point_up, {"adapterx/runtime/x.py": "from adapterx.graph import find\n"}),
    "in a function": (
        laws.imports_that_point_up,
        {"adapterx/formats/x.py": "def f():\n    import adapterx.graph.find\n"},
    ),
    "relative": (laws.imports_that_point_up, {"adapterx/formats/x.py": "from ..runtime.session import run\n"}),
    "bottom to formats": (laws.imports_that_point_up, {"adapterx/ops.py": "from adapterx.formats import npz\n"}),
    "through the door": (laws.imports_that_point_up, {"adapterx/graph/x.py": "import adapterx as ax\n"}),
    "a name of the door": (laws.imports_that_point_up, {"adapterx/graph/x.py": "from adapterx import find_sites\n"}),
    "in no layer": (laws.imports_that_point_up, {"adapterx/stray.py": ""}),
    "two at the bottom": (
        laws.import_cycles,
        {"adapterx/adapter.py": "import adapterx.site\n", "adapterx/site.py": "from adapterx.adapter import A\n"},
    ),
    "a cycle in functions": (
        laws.import_cycles,
        {
            "adapterx/graph/a.py": "def f():\n    from adapterx.graph import b\n",
            "adapterx/graph/b.py": "from adapterx.graph.a import f\n",
        },
    ),
    "a long module": (laws.long_files, {"adapterx/adapter.py": "x = 1\n" * 401}),
    "a long test": (laws.long_files, {"tests/graph/test_y.py": "x = 1\n" * 401}),
    "a long kernel": (laws.long_files, {"kernels/low_rank_add.cu": "//\n" * 401}),
    "utils": (laws.nounless_names, {"adapterx/graph/utils.py": ""}),
    "graph_helpers": (laws.nounless_names, {"tests/graph_helpers.py": ""}),
    "a folder": (laws.nounless_names, {"adapterx/core/find.py": ""}),
    "a print": (laws.prints, {"adapterx/graph/find.py": "def f():\n    print(1)\n"}),
    "a home": (laws.machine_paths, {"docs/x.md": "see " + "/home/" + "someone/notes"}),
    "scratch": (laws.machine_paths, {"bench/x.py": "OUT = '" + "/tmp/" + "out'\n"}),
    "in the build": (laws.machine_paths, {"Makefile": "PY := " + "/opt/" + "python/bin/python\n"}),
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_sound_tree_passes(law: Law, tmp_path: Path) -> None:
    assert not law(tree(tmp_path, SOUND))


@pytest.mark.parametrize(("law", "files"), BROKEN.values(), ids=BROKEN)
def test_a_broken_tree_is_caught(law: Law, files: dict[str, str], tmp_path: Path) -> None:
    (message,) = law(tree(tmp_path, SOUND | files))
    assert any(Path(name).stem in message for name in files)


def test_400_lines_and_the_command_lines_print_are_allowed(tmp_path: Path) -> None:
    root = tree(tmp_path, SOUND | {"adapterx/adapter.py": "x = 1\n" * 400, "adapterx/cli.py": "print(1)\n"})
    assert not laws.long_files(root)
    assert not laws.prints(root)


def loaded_by(statement: str) -> set[str]:
    """Modules that a fresh Python holds after ``statement`` and would not hold without it."""
    program = f"import sys; before = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(run.stdout.split())


def packages(modules: set[str]) -> set[str]:
    """Top-level packages that do not come with Python."""
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names


def test_importing_adapterx_imports_nothing_but_adapterx() -> None:
    assert packages(loaded_by("import adapterx")) == {"adapterx"}


TRAINING = {"torch", "transformers", "peft", "optimum", "onnxruntime_genai", "onnxscript"}


def test_every_public_name_can_be_used_without_torch_and_without_the_command_line() -> None:
    used = packages(loaded_by("import adapterx\nfor name in adapterx.__all__: getattr(adapterx, name)"))
    assert {"onnx", "onnxruntime"} <= used
    assert not used & (TRAINING | {"typer"})


def test_a_session_and_a_reader_never_import_what_rewrites_graphs() -> None:
    used = loaded_by("import adapterx as ax; ax.AdapterSession, ax.load_adapter")
    assert "adapterx.runtime.session" in used
    assert not {name for name in used if name.startswith("adapterx.graph")}
    assert not packages(used) & (TRAINING | {"typer", "onnx_ir"})
