"""Verbs: prepare, run, convert; or quantize, which is the three in one. As Neural Compressor's, without its surprises.

What is quantized is the weights in memory. Methods are mixed freely, layer by layer, in one walk over the blocks. A
call that fails leaves the model in float as it was.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from adapterx.errors import OptionError
from adapterx.progress import steps
from adapterx.quant.blocks import Block, walk
from adapterx.quant.calibration import Calibration
from adapterx.quant.config_mapping import method_mapping
from adapterx.quant.configs import AnyConfig, as_config
from adapterx.quant.dispatch import by_kind, check_layers, layer_by, needs_data
from adapterx.quant.fake_quant import fake_layers
from adapterx.quant.fold import Fold
from adapterx.quant.linear import as_quantized
from adapterx.quant.originals import Originals, restored
from adapterx.quant.storage import mark_quantized

QuantConfig = AnyConfig | Mapping[str, Any]
_PREPARED = "adapterx_preparation"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Preparation:
    """What `prepare` leaves for `convert`. A copy of the model shares it; `Calibration.moved_to` tells them apart."""

    config: AnyConfig
    methods: Mapping[str, Any]
    calibration: Calibration | None

    def __deepcopy__(self, memo: object) -> _Preparation:
        return self


def prepare(model: nn.Module, quant_config: QuantConfig, inplace: bool = True, example_inputs: Any = None) -> nn.Module:
    """Make ready for calibration: run the model on a few batches afterwards, then `convert` it.

    Args:
        model: in float; layers that are quantized already stay as they are
        quant_config: a config, a sum of configs, or a dict ``{"rtn": {"bits": 4}}``
        inplace: prepare ``model`` itself, else a copy
        example_inputs: kept as ``model.example_inputs``; nothing here needs them

    Returns:
        The model, with ``is_prepared`` and ``quant_config``.

    Raises:
        OptionError: a config that does not fit the model, or groups that do not fit layers
        ModelError: no layers to quantize, or weights that are NaN or infinite
    """
    config = as_config(quant_config)
    methods = method_mapping(model, config)
    check_layers(model, methods)
    model = model if inplace else copy.deepcopy(model)
    unprepare(model)
    needed = [name for name, method in methods.items() if needs_data(method)]
    calibration = Calibration(model, needed) if needed else None
    _set(model, _PREPARED, _Preparation(config, methods, calibration))
    _set(model, "is_prepared", True)
    _set(model, "quant_config", config)
    _set(model, "example_inputs", example_inputs)
    return model


def convert(model: nn.Module, quant_config: QuantConfig | None = None, inplace: bool = True) -> nn.Module:
    """Quantize a prepared model, one that needs no calibration, or one that `prepare_qat` made ready and was trained.

    A layer that needs data sees its block's inputs as the quantized blocks before it give them. Layers without data
    come first in each block.

    Args:
        model: prepared, and run on calibration data where a method needs some
        quant_config: for a model that is not prepared; for one that is, None or an equal one
        inplace: quantize ``model`` itself, else a copy, and ``model`` stays prepared

    Returns:
        The model, with ``quant_config`` and ``save(output_dir, format)``; a previous ``save`` is ``orig_save``. But for
        transformers' models also with ``is_quantized``. ``folds`` says which scales were moved into producers:
        `rebase_adapter` wants them.

    Raises:
        OptionError: no config, or another than the model was prepared with
        FeedError: layers that need calibration data and that none reached; the model stays prepared
        ModelError: what a method cannot quantize; the model is in float again, as it was, and no longer prepared
    """
    preparation = _preparation(model)
    if preparation is None and quant_config is None and fake_layers(model):
        return _frozen(model if inplace else copy.deepcopy(model))
    if preparation is None:
        if quant_config is None:
            raise OptionError(
                "the model is not prepared; call prepare(model, quant_config) first, or pass quant_config"
            )
        return _done(prepare(model, quant_config, inplace=inplace))
    if quant_config is not None and as_config(quant_config) != preparation.config:
        raise OptionError(
            f"the model was prepared with {preparation.config!r}, which is not {quant_config!r}; prepare it again, or "
            f"leave quant_config out"
        )
    if preparation.calibration is not None:
        preparation.calibration.require()
    return _done(model if inplace else copy.deepcopy(model))


def quantize(
    model: nn.Module,
    quant_config: QuantConfig,
    run_fn: Callable[..., object] | None = None,
    run_args: Any = None,
    inplace: bool = True,
    example_inputs: Any = None,
) -> nn.Module:
    """`prepare`, ``run_fn(model, *run_args)``, `convert`: the same weights, bit for bit.

    Raises:
        OptionError: see `prepare` and `convert`
        FeedError: likewise
        ModelError: likewise; the model is left as it was, whatever is raised, ``run_fn``'s own errors included
    """
    prepared = prepare(model, quant_config, inplace=inplace, example_inputs=example_inputs)
    try:
        if run_fn is not None:
            args = () if run_args is None else run_args if isinstance(run_args, list | tuple) else (run_args,)
            run_fn(prepared, *args)
        return convert(prepared)
    except BaseException:
        unprepare(prepared)
        raise


def unprepare(model: nn.Module) -> None:
    """Take back what `prepare` did."""
    preparation = _preparation(model)
    if preparation is None:
        return
    if preparation.calibration is not None:
        own = preparation.calibration.model is model
        (preparation.calibration if own else preparation.calibration.moved_to(model)).detach()
    for name in (_PREPARED, "is_prepared", "quant_config", "example_inputs"):
        delattr(model, name)


def _done(model: nn.Module) -> nn.Module:
    """A prepared model, quantized in place; after an error it is not even prepared."""
    preparation = _preparation(model)
    assert preparation is not None, "the caller has prepared it"
    calibration = preparation.calibration
    if calibration is not None and calibration.model is not model:
        calibration = calibration.moved_to(model)
    try:
        if calibration is not None:
            calibration.require()
            calibration.detach()
        with restored(model) as originals, _evaluated(model):
            folds = _quantize_layers(originals, preparation.methods, calibration)
    finally:
        unprepare(model)
    mark_quantized(model)
    _set(model, "quant_config", preparation.config)
    _set(model, "folds", folds)
    return model


def _frozen(model: nn.Module) -> nn.Module:
    """A model from `prepare_qat`, its layers as they were trained."""
    with restored(model) as originals:
        for name, layer in fake_layers(model).items():
            originals.untie(name)
            originals.replace(name, layer.frozen())
    mark_quantized(model)
    return model


def _quantize_layers(
    originals: Originals, methods: Mapping[str, Any], calibration: Calibration | None
) -> tuple[Fold, ...]:
    """Quantize every layer; gives what was folded into producers, which adapters have to be carried over."""
    folds: list[Fold] = []
    for name in methods:
        originals.untie(name)
    walked = [] if calibration is None else [n for n in methods if needs_data(methods[n]) or _in_chain(n, calibration)]
    with steps("quantizing", total=len(methods)) as advance, torch.enable_grad():
        if calibration is not None:
            for block, names in walk(calibration, walked):
                prefix = f"{block.name}." if block.name else ""
                _quantize_block(originals, block, {name: methods[prefix + name] for name in names})
                folds += [fold.within(block.name) for fold in block.folds]
                advance(len(names), functools.partial(_outcome, block))
        for name in [name for name in methods if name not in walked]:
            originals.replace(name, layer_by(originals.model.get_submodule(name), methods[name], name=name))
            advance(1, functools.partial(str, name))
    return tuple(folds)


def _in_chain(name: str, calibration: Calibration) -> bool:
    # What lies elsewhere and needs no data is spared a run of the whole model.
    return any(name.startswith(f"{block}.") for chain in calibration.unbroken_chains() for block in chain)


def _outcome(block: Block) -> str:
    return f"{block.name or 'the rest'}, error {block.error():.1e}"


def _quantize_block(originals: Originals, block: Block, methods: Mapping[str, Any]) -> None:
    """One block; the names of ``methods`` are those within it."""
    prefix = f"{block.name}." if block.name else ""
    for name, method in methods.items():
        if not needs_data(method):
            layer = layer_by(block.module.get_submodule(name), method, name=prefix + name)
            originals.replace(prefix + name, layer)
    for function, layers in by_kind(methods):
        with originals.guarding(block.module):
            found = function(block, layers)
        for name, quantized in found.items():
            originals.replace(prefix + name, as_quantized(block.module.get_submodule(name), quantized))


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation: a block that drops out at random would be quantized at random."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)


def _preparation(model: nn.Module) -> _Preparation | None:
    found = getattr(model, _PREPARED, None)
    return found if isinstance(found, _Preparation) else None


def _set(model: nn.Module, name: str, value: object) -> None:
    # Past nn.Module, which would register a model's own modules a second time.
    object.__setattr__(model, name, value)
