"""Tuning: try configs one after another until one is good enough, and keep the best."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn

from adapterx.errors import OptionError
from adapterx.progress import steps
from adapterx.quant.configs import AnyConfig, as_config
from adapterx.quant.verbs import QuantConfig, quantize

Goal = Literal["higher", "lower"] | Callable[[float, float], bool]
Sampler = Callable[[Sequence[AnyConfig]], Iterable[AnyConfig]]


def sequential(configs: Sequence[AnyConfig]) -> Iterable[AnyConfig]:
    """The configs in their order."""
    return configs


@dataclasses.dataclass(frozen=True, slots=True)
class TuningConfig:
    """What `autotune` tries, and when it is content.

    Args:
        config_set: a config or several; lists in fields stand for one config a value, later fields varying fastest,
            and equal configs are tried once
        sampler: the order in which they are tried
        tolerable_loss: share of the baseline's magnitude that a result may be worse by; negative: must be better by
        max_trials: configs tried at most
        goal: "higher" or "lower" is better (accuracy, perplexity); or ``goal(result, baseline)``, whether a result is
            good enough, higher then being better among those that are not
        higher_is_better: the same as ``goal="higher"`` or ``"lower"``

    Raises:
        OptionError: no config, fewer than one trial, or two goals that contradict each other
    """

    config_set: Any = None
    sampler: Sampler = sequential
    tolerable_loss: float = 0.01
    max_trials: int = 100
    goal: Goal = "higher"
    higher_is_better: bool | None = None

    def __post_init__(self) -> None:
        if self.config_set is None or self.config_set == []:
            raise OptionError("config_set is empty; give a config, a list of them, or get_all_config_set()")
        if self.max_trials < 1:
            raise OptionError(f"max_trials={self.max_trials!r}; expected at least 1")
        if not callable(self.goal) and self.goal not in ("higher", "lower"):
            raise OptionError(f"goal={self.goal!r}; expected 'higher', 'lower', or a function of result and baseline")
        if self.higher_is_better is not None:
            goal: Goal = "higher" if self.higher_is_better else "lower"
            if self.goal not in ("higher", goal):
                raise OptionError(f"goal={self.goal!r} and higher_is_better={self.higher_is_better!r}")
            object.__setattr__(self, "goal", goal)

    def configs(self) -> list[AnyConfig]:
        """The single configs, in the order in which they are tried."""
        given = self.config_set
        several: Sequence[QuantConfig] = given if isinstance(given, list | tuple) else [given]
        found: list[AnyConfig] = []
        for one in several:
            found += [config for config in as_config(one).expand() if config not in found]
        return list(self.sampler(found))[: self.max_trials]

    def is_met(self, result: float, baseline: float) -> bool:
        """Whether a result is good enough. What is tolerated is a share of the baseline's size, whatever its sign.

        Example:
            >>> TuningConfig({"rtn": {}}, goal="lower").is_met(20.1, 20.0)
            True
        """
        if callable(self.goal):
            return self.goal(result, baseline)
        tolerated = self.tolerable_loss * abs(baseline)
        return result >= baseline - tolerated if self.goal == "higher" else result <= baseline + tolerated

    def is_better(self, result: float, other: float) -> bool:
        """Whether ``result`` is better than ``other``; NaN is never."""
        if math.isnan(other):
            return not math.isnan(result)
        return result < other if self.goal == "lower" else result > other


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One config that was tried, and what ``eval_fn`` gave."""

    config: AnyConfig
    result: float


def autotune(
    model: nn.Module,
    tune_config: TuningConfig,
    eval_fn: Callable[..., float],
    eval_args: Any = None,
    run_fn: Callable[..., object] | None = None,
    run_args: Any = None,
    example_inputs: Any = None,
) -> nn.Module:
    """The model quantized by the first config that is good enough, or by the best where none is.

    ``model`` stays as it is; each trial quantizes a copy. The best model so far is kept, so it is not made twice.

    Args:
        model: in float
        tune_config: what is tried
        eval_fn: ``eval_fn(model, *eval_args)``, a number
        eval_args: a tuple, or one argument
        run_fn: calibration, as for `quantize`
        run_args: likewise
        example_inputs: likewise

    Returns:
        A quantized model with ``trials``, what was tried and how it did, and ``baseline``.

    Raises:
        OptionError: no config, or one that does not fit the model
    """
    configs = tune_config.configs()
    if not configs:
        raise OptionError("the sampler leaves no config to try")
    baseline = _evaluated(copy.deepcopy(model), eval_fn, eval_args)
    trials: list[Trial] = []
    best, best_result = None, float("nan")
    with steps("tuning", total=len(configs)) as advance:
        for config in configs:
            tried = quantize(copy.deepcopy(model), config, run_fn, run_args, example_inputs=example_inputs)
            result = _evaluated(tried, eval_fn, eval_args)
            trials.append(Trial(config, result))
            advance(1, lambda result=result: f"{result:.6g}, baseline {baseline:.6g}")  # type: ignore[misc]
            met = tune_config.is_met(result, baseline)
            if best is None or met or tune_config.is_better(result, best_result):
                best, best_result = tried, result
            if met:
                break
    assert best is not None, "there is a config"
    object.__setattr__(best, "trials", trials)
    object.__setattr__(best, "baseline", baseline)
    return best


def _evaluated(model: nn.Module, eval_fn: Callable[..., float], eval_args: Any) -> float:
    args = () if eval_args is None else eval_args if isinstance(eval_args, list | tuple) else (eval_args,)
    return float(eval_fn(model, *args))
