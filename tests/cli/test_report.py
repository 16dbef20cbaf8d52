"""What holds for every command: exit codes, where words go, what a refusal looks like."""

import importlib.metadata
import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import typer

from adapterx.cli.environment import environment
from adapterx.cli.report import new_table, print_json, print_table, printable, reported, say
from adapterx.errors import ModelError
from adapterx.runtime.kernels import find_kernels
from tests.cli.conftest import Type

COMMANDS = ("sites", "extract", "inject", "verify", "convert", "merge", "run", "env")
REFUSED = (
    ("sites", "no.onnx"),
    ("extract", "no.onnx", "out"),
    ("verify", "no.onnx", "no.onnx"),
    ("inject", "no.onnx", "out", "--target", "q_proj"),
    ("convert", "no.onnx", "no.onnx", "out.npz"),
    ("merge", "no.onnx", "no.onnx", "out.onnx"),
    ("run", "no.onnx"),
)


@pytest.mark.parametrize("command", REFUSED, ids=lambda command: command[0])
def test_a_file_that_is_not_there_is_one_message_on_stderr_and_exit_code_1(
    run: Type, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*command)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(("error: ModelError: no.onnx", "error: FormatError: no.onnx"))
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", REFUSED, ids=lambda command: command[0])
def test_with_json_the_refusal_is_json_on_stdout(run: Type, command: tuple[str, ...]) -> None:
    result = run(*command, "--json")
    assert result.exit_code == 1
    assert result.stderr == ""
    told = json.loads(result.stdout)
    assert told["error"]["type"] in {"ModelError", "FormatError"}
    assert told["error"]["message"].startswith("no.onnx")


@pytest.mark.parametrize(
    "arguments", [(), ("sits",), ("sites",), ("sites", "a", "b"), ("sites", "a", "--jsn"), ("run", "a", "--seed", "x")]
)
def test_a_wrong_command_line_exits_2(run: Type, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_mistyped_command_or_option_is_told_the_nearest(run: Type) -> None:
    assert "sites" in run("sits").stderr
    assert "--structural" in run("sites", "a.onnx", "--structurl").stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Type, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_version_is_the_one_of_the_package(run: Type) -> None:
    assert run("--version").stdout == f"adapterx {importlib.metadata.version('adapterx')}\n"


def outcome(error: BaseException) -> int:
    @reported
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    return caught.value.exit_code


def test_ctrl_c_exits_130_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


def test_what_the_system_and_onnx_runtime_refuse_is_a_message_too(capsys: pytest.CaptureFixture[str]) -> None:
    fail = onnxruntime.capi.onnxruntime_pybind11_state.Fail
    assert outcome(PermissionError(13, "denied", "x.onnx")) == 1
    assert outcome(fail("bad node")) == 1
    assert [line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines()] == ["PermissionError", "Fail"]


@pytest.mark.parametrize("bug", [ValueError("a bug"), KeyError("a bug"), BrokenPipeError()])
def test_bugs_keep_their_traceback_and_a_closed_pipe_is_left_to_the_framework(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        reported(lambda: (_ for _ in ()).throw(bug))()


def test_control_characters_of_a_file_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    outcome(ModelError("node '\x1b]0;owned\x07' \u202e is odd\nsecond line"))
    assert capsys.readouterr().err == "error: ModelError: node '\\x1b]0;owned\\x07' \\u202e is odd\nsecond line\n"
    assert printable("grün\n") == "grün\n"


def test_a_table_is_as_wide_as_its_names_and_takes_none_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("site", "size")
    name = "model.layers[0]." + "deep." * 60 + "[/red]:smile:"
    table.add_row(name, "1")
    print_table(table)
    assert capsys.readouterr().out.splitlines()[1].split() == [name, "1"]


def test_results_and_messages_go_apart(capsys: pytest.CaptureFixture[str]) -> None:
    say("message")
    print_json({"path": Path("x")})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "x"}
    assert err == "message\n"


def test_env_tells_versions_and_providers(run: Type) -> None:
    told = json.loads(run("env", "--json").stdout)
    assert told["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert told["providers"] == onnxruntime.get_available_providers()
    assert told["python"].split()[-1] == ".".join(map(str, sys.version_info[:3]))
    assert told["kernels"]["path"] == str(find_kernels().path)
    assert told["kernels"]["providers"][0] == "CPUExecutionProvider"
    assert told["kernels"]["isa"] in {"portable", "avx2", "avx512"}
    shown = dict(line.split(maxsplit=1) for line in run("env").stdout.splitlines())
    assert set(shown) == {"what", *told}
    assert told["kernels"]["path"] in shown["kernels"]
    assert shown["onnx"].strip() == importlib.metadata.version("onnx")


def test_env_tells_where_there_are_no_kernels_and_what_is_wrong_with_them(
    run: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "adapterx_kernels", None)
    assert environment()["kernels"] is None
    monkeypatch.setenv("ADAPTERX_KERNELS", "lost.so")
    assert environment()["kernels"] == json.loads(run("env", "--json").stdout)["kernels"]
    assert "ADAPTERX_KERNELS=lost.so: no such file" in str(environment()["kernels"])


def test_env_works_where_onnx_runtime_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (provider,) = environment()["providers"]
    assert provider.startswith("none:")
