import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import adapterx as ax

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output_of(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, SAMPLES / script, *arguments], cwd=SAMPLES.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def quick(demo, tmp_path, monkeypatch):
    """The demo on a slice of the text, writing elsewhere."""
    monkeypatch.setattr(demo, "OUT", tmp_path / "demo")
    return lambda: demo.main(windows=12, length=4)


def test_01_extract_shows_every_site_and_finds_the_adapter_that_was_exported(tmp_path):
    text = output_of("01_extract.py", tmp_path)
    assert text.count("  python   lora  MatMul  ") == 21, text
    assert "model.layers.2.mlp.down_proj" in text
    assert {path.name for path in tmp_path.iterdir()} == {"demo.onnx", "adapter.safetensors"}
    differs = float(text.rsplit("B differs by ", 1)[1])
    assert differs < 1e-6


def test_02_swap_writes_another_text_under_each_adapter(tmp_path):
    lines = output_of("02_swap.py", tmp_path).splitlines()
    written = [line.split(" writes ")[1] for line in lines if " writes " in line]
    guessed = [line.split(" expects ")[1] for line in lines if " expects " in line]
    assert len(set(written)) == 3, written
    assert len(set(guessed)) == 3, guessed


def test_03_mixed_batch_writes_another_text_in_every_row_of_one_batch(tmp_path):
    text = output_of("03_mixed_batch.py", tmp_path)
    titles = ["python", "licence", "header", "base", "half licence, half header"]
    written = [text.split(f"{title}:\n", 1)[1].split("\n\n", 1)[0] for title in titles]
    assert len(set(written)) == 5, written
    assert min(map(len, written)) > 20
    assert float(text.split(" differs by ")[1].split()[0]) < 1e-3
    assert text.endswith("verify_mixed: passed\n")


def test_03_mixed_batch_writes_side_by_side_in_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["03_mixed_batch.py", str(tmp_path)])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "130")
    path = SAMPLES / "03_mixed_batch.py"
    source = path.read_text()
    assert "length = 120" in source
    exec(compile(source.replace("length = 120", "length = 3"), path, "exec"), {"__file__": str(path)})
    lines = capsys.readouterr().out.splitlines()
    assert any("python" in line and "licence" in line and "header" in line for line in lines)


def test_04_any_base_gives_each_adapter_its_own_guess_and_merges_what_is_fed(tmp_path):
    lines = output_of("04_any_base.py", tmp_path).splitlines()
    guessed = {line.split()[0]: line.split(" one of ")[1][:7] for line in lines if " expects " in line}
    assert guessed["merged"] == guessed["licence"]
    assert len(set(guessed.values())) == 4, lines
    merged = next(line for line in lines if line.startswith("merged"))
    assert float(merged.split(", ")[1].split(" from ")[0]) < 1e-4


def test_05_quantize_learns_on_four_bits_and_serves_what_torch_computes(tmp_path):
    text = output_of("05_quantize.py", tmp_path)
    seen = {line[:25].strip(): float(line[25:]) for line in text.splitlines() if line[25:26].isdigit()}
    assert seen["AWQ, 4 bits"] < seen["float base"] * 1.02
    assert seen["+ LoRA, in torch"] < seen["AWQ, 4 bits"] * 0.98
    assert abs(seen["+ LoRA, on ONNX Runtime"] - seen["+ LoRA, in torch"]) < 2e-3
    assert abs(seen["base alone"] - seen["AWQ, 4 bits"]) < 2e-3
    assert float(text.rsplit(" by ", 1)[1]) < 1e-3
    assert "21 layers became MatMulNBits, 4 bits, block 32" in text


def test_every_adapter_of_the_demo_is_best_on_its_own_kind_of_held_out_text_and_the_base_on_none(quick, capsys):
    quick()
    text = capsys.readouterr().out
    starred = [line.split("*")[0].split() for line in text.splitlines() if "*" in line and line.startswith("  base + ")]
    assert [(row[2], len(row) - 3) for row in starred] == [("python", 1), ("licence", 2), ("header", 3)]


def test_the_demo_ends_by_naming_a_command_that_works_as_typed(quick, capsys, monkeypatch):
    monkeypatch.chdir(SAMPLES.parent)
    quick()
    command = capsys.readouterr().out.strip().splitlines()[-1]
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.layers.0.self_attn.q_proj" in done.stdout


def test_the_demo_fails_and_names_the_adapter_that_lost(demo, quick, monkeypatch):
    fair = demo.perplexity
    # As if two adapters had been mixed up.
    other = {"licence": "header", "header": "licence"}
    monkeypatch.setattr(demo, "perplexity", lambda s, name, **rest: fair(s, other.get(name, name), **rest))
    with pytest.raises(SystemExit, match=r"adapter 'licence' has perplexity .* on its own kind of text, header has"):
        quick()


def test_the_adapters_of_the_demo_differ_in_rank_and_one_has_two():
    ranks = {path.name: ax.load_adapter(path).ranks for path in (SAMPLES / "models" / "adapters").iterdir()}
    assert ranks == {"python": (8,), "licence": (4,), "header": (8, 16)}


def test_what_the_demo_reads_is_small_enough_for_a_repository_and_names_no_folder_of_its_maker():
    files = [path for path in (SAMPLES / "models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    assert [path for path in files if b'File "/' in path.read_bytes()] == []


def test_a_document_that_shares_text_with_the_held_out_text_is_not_trained_on_and_no_other_twice():
    demo_text = load("demo_text")
    held_out = (SAMPLES / "models" / "held_out" / "python.txt").read_text()
    own = "\n".join(f"def own_{i}(a, b): return a + b * {i}" for i in range(400))
    texts = [text.encode() for text in (own, held_out[2000:6000] + own, own)]
    assert list(demo_text.documents(texts, exclude=demo_text.shingles(held_out))) == [own.encode()]


def test_no_sample_but_those_that_train_imports_more_than_adapterx_cpu_installs():
    installed = {"adapterx", "numpy", "onnxruntime", "rich"}
    for path in SAMPLES.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        more = {name.split(".")[0] for name in names} - installed - set(sys.stdlib_module_names)
        assert bool(more) == (path.name in {"make_demo_model.py", "05_quantize.py"}), (path.name, more)
