"""build(name): a case from the cache, or exported into it. Several processes may build at once."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.zoo.case import Built, Case, TruthSite
from tests.zoo.cases import CASES

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "zoo"
TABLES = {"cases.py", "kind_cases.py", "quantized_cases.py", "__init__.py"}
VERSIONED = ("torch", "transformers", "peft", "onnxscript", "onnxruntime", "onnx", "optimum-onnx", "onnxruntime-genai")


def build(name: str) -> Built:
    """The case of that name, exported if the cache does not hold it as it would be made today."""
    case = CASES[name]
    home = CACHE / name
    with _locked(CACHE / f"{name}.lock"):
        if not _is_fresh(home, case):
            _make(case, home)
    return _read(home)


@functools.cache
def key(name: str) -> str:
    """What the product depends on: this package's sources without the tables, the case, its source, versions."""
    case, digest = CASES[name], hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        if path.name not in TABLES:
            digest.update(path.read_bytes())
    digest.update(repr(dataclasses.replace(case, note="")).encode())
    digest.update(key(case.source).encode() if case.source else b"")
    for package in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package}={importlib.metadata.version(package)}".encode())
    return digest.hexdigest()


def _is_fresh(home: Path, case: Case) -> bool:
    stamp = home / "key"
    return stamp.exists() and stamp.read_text() == key(case.name)


def _make(case: Case, home: Path) -> None:
    # Only here, so that reading a case from the cache never waits for torch.
    from tests.zoo.export import make

    source = (_original(case), build(case.source)) if case.source else None
    work = home.with_name(f"{home.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        facts = make(case, work, source)
        np.savez(work / "feeds.npz", **facts.feeds)
        np.savez(
            work / "expected.npz", **{f"{k}/{i}": v for k, outs in facts.expected.items() for i, v in enumerate(outs)}
        )
        (work / "truth.json").write_text(json.dumps(facts.truth))
        (work / "key").write_text(key(case.name))
        shutil.rmtree(home, ignore_errors=True)
        work.rename(home)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _original(case: Case) -> Case:
    """The case that ``case`` was made from, in as many steps as it took."""
    while case.source:
        case = CASES[case.source]
    return case


def _read(home: Path) -> Built:
    expected: dict[str, list[np.ndarray]] = {}
    with np.load(home / "expected.npz") as stored:
        for label in stored.files:
            expected.setdefault(label.rsplit("/", 1)[0], []).append(stored[label])
    with np.load(home / "feeds.npz") as stored:
        feeds = dict(stored)
    base = home / "base.onnx"
    folders = sorted((home / "adapters").iterdir()) if (home / "adapters").exists() else []
    return Built(
        model=home / "model.onnx",
        base_model=base if base.exists() else None,
        adapters={folder.name: folder for folder in folders},
        feeds=feeds,
        expected=expected,
        truth=[TruthSite(*row) for row in json.loads((home / "truth.json").read_text())],
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
