"""The program as a user starts it: a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from adapterx.cli import app
from tests.zoo import Built

SCRIPT = Path(sys.executable).with_name("adapterx")
WAYS = {"script": [str(SCRIPT)], "module": [sys.executable, "-m", "adapterx"]}
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_both_ways_to_start_it_give_pure_json_and_exit_codes(way: list[str], mlp: Built) -> None:
    done = subprocess.run([*way, "sites", mlp.model, "--json"], capture_output=True, text=True, check=True, timeout=60)
    assert [row["name"] for row in json.loads(done.stdout)] == [site.name for site in mlp.truth]
    refused = subprocess.run([*way, "sites", mlp.base_model], capture_output=True, text=True, check=False, timeout=60)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: NoAdaptersFound:")


def test_help_waits_for_nothing_that_only_commands_need() -> None:
    program = (
        "import sys; sys.argv = ['adapterx', '--help']\n"
        "from adapterx.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "extract" in done.stdout
    assert not {"numpy", "onnx", "onnx_ir", "onnxruntime", "torch"} & set(done.stderr.split())


def test_a_reader_that_hangs_up_ends_it_quietly(mlp: Built) -> None:
    with subprocess.Popen(
        [*WAYS["module"], "sites", mlp.model, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_the_page_shows_every_command_and_option_and_no_others() -> None:
    commands = get_command(app).commands
    text = DOCUMENT.read_text()
    sections = dict(re.findall(r"^## `adapterx (\w+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(commands)
    for name, command in commands.items():
        options = {spelling for p in command.params for spelling in (*p.opts, *p.secondary_opts) if "--" in spelling}
        shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", sections[name]))
        assert shown == options - {"--help"}, name


def test_where_onnx_runtime_is_missing_sites_works_and_run_says_what_to_install(mlp: Built) -> None:
    program = (
        "import sys; sys.modules['onnxruntime'] = None; sys.argv = ['adapterx', *sys.argv[1:]]\n"
        "from adapterx.cli import main; main()"
    )
    sites, run = (
        subprocess.run(
            [sys.executable, "-c", program, command, mlp.model], capture_output=True, text=True, check=False, timeout=60
        )
        for command in ("sites", "run")
    )
    assert sites.returncode == 0
    assert run.returncode == 1
    assert run.stderr.startswith("error: MissingDependency:")
    assert "adapterx[cpu]" in run.stderr
    assert "adapterx[gpu]" in run.stderr
