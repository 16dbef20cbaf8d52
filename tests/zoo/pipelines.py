"""Exporters that take a checkpoint or an adapter folder and write a whole deployment: optimum and the genai builder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import transformers
from torch import nn

from tests.zoo.exporters import quiet
from tests.zoo.models import Subject


def optimum_main(subject: Subject, adapter: Path | None, out: Path, *, task: str) -> None:
    """``optimum-cli export onnx`` on a checkpoint, or an adapter's folder, which has to hold the base's config too."""
    from optimum.exporters.onnx import main_export

    with _checkpoint(subject.model) as checkpoint, quiet():
        given = _beside_config(adapter, checkpoint) if adapter else checkpoint
        main_export(str(given), output=out, task=task, library_name="transformers", do_validation=False)


def _beside_config(adapter: Path, checkpoint: Path) -> Path:
    both = shutil.copytree(adapter, checkpoint / "both")
    shutil.copy(checkpoint / "config.json", both)
    config = json.loads((both / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(checkpoint)
    (both / "adapter_config.json").write_text(json.dumps(config))
    return both


def optimum_model(subject: Subject, adapter: Path | None, out: Path, *, task: str) -> None:
    """A transformers model that has loaded the adapter by itself: no PeftModel, no prefix."""
    from optimum.exporters.onnx import onnx_export_from_model

    with quiet():
        model: Any = subject.model
        if adapter:
            model.load_adapter(str(adapter))
        onnx_export_from_model(model, out, task=task, do_validation=False)


def genai(subject: Subject, adapter: Path | None, out: Path, *, dtype: str = "FLOAT") -> None:
    """onnxruntime-genai's builder: an own graph, the scale inside B, packed projections split.

    Without an adapter it packs q, k and v into one product instead.
    """
    from peft import PeftConfig

    with _checkpoint(subject.model) as checkpoint, quiet(), _silent(), _builders() as builders:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        # transformers 5 has moved these, and the builder reads them where they are now.
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
        config.rope_scaling = {}
        if adapter:
            config.update(PeftConfig.from_pretrained(str(adapter)).__dict__)
        kind = {"LlamaForCausalLM": builders.LlamaModel, "Phi3ForCausalLM": builders.Phi3MiniModel}
        options = {"hf_token": False} | ({"adapter_path": str(adapter)} if adapter else {})
        single, stored = ir.DataType.FLOAT, ir.DataType[dtype]
        builder = kind[config.architectures[0]](config, single, stored, "cpu", str(checkpoint), options)
        builder.model_name_or_path = str(checkpoint)
        builder.make_model(str(checkpoint))
        out.mkdir(parents=True)
        builder.save_model(str(out))


@contextlib.contextmanager
def _checkpoint(model: nn.Module) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)  # type: ignore[operator]  # every model that comes here is transformers'
        yield Path(folder)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The builder prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _builders() -> Iterator[Any]:
    """The builder's model classes. It is a script with top-level packages of its own, written for transformers 5."""
    spec = importlib.util.find_spec("onnxruntime_genai")
    assert spec is not None
    assert spec.submodule_search_locations
    root = str(Path(spec.submodule_search_locations[0]) / "models")
    unknown_here = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
    added = [name for name in unknown_here if not hasattr(transformers, name)]
    for name in added:
        setattr(transformers, name, type(name, (), {}))
    sys.path.insert(0, root)
    try:
        import builders

        yield builders
    finally:
        sys.path.remove(root)
        for name in added:
            delattr(transformers, name)


PIPELINES: dict[str, Callable[..., None]] = {f.__name__: f for f in (optimum_main, optimum_model, genai)}
