"""The benches run, on small sizes; what they measure is in docs/performance.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.parametrize(
    "script", ["extract.py", "inject.py", "swap.py", "feed.py", "merge.py", "convert.py", "bank.py", "quant_decode.py"]
)
def test_a_bench_measures_every_way_and_its_peer(script: str) -> None:
    command = [sys.executable, str(BENCH / script), "--quick", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report["results"]
    for result in report["results"]:
        times = {row["way"]: row["milliseconds"] for row in result["rows"]}
        assert result["peer"] in times
        assert any(way.startswith("adapterx") for way in times)
        assert all(value > 0 for value in times.values())


def test_the_bench_of_kinds_finds_every_kind_exact() -> None:
    command = [sys.executable, str(BENCH / "kinds.py"), "--quick", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    assert len(rows) >= 20
    for kind, row in rows.items():
        errors = {label: error for label, error in row.items() if label != "models"}
        assert {"a", "b"} <= errors.keys()
        assert max(errors.values()) < (2e-2 if "float16" in kind or "static" in kind else 1e-4), kind


def test_the_bench_of_quantizers_measures_perplexity_and_keeps_its_rows(tmp_path: Path) -> None:
    only = ["--only", "adapterx, (RTN|int8, static)$", "--models", "twin", "--write", str(tmp_path / "rows.json")]
    command = [sys.executable, str(BENCH / "quant.py"), "--quick", "--json", *only]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert {row["way"]: row["bits"] for row in report["rows"]} == {"adapterx, RTN": 2, "adapterx, int8, static": 8}
    assert all(row["perplexity"] > 0.9 * report["float"]["twin"] for row in report["rows"])
    assert json.loads((tmp_path / "rows.json").read_text()) == report["rows"]
