"""Calls of LowRankAdd, what they give in double precision, and how far off each element type may be."""

import ml_dtypes
import numpy as np

from adapterx.ops import low_rank_add

ROUNDING = {"float64": 1e-15, "float32": 1e-7, "float16": 2**-11, "bfloat16": 2**-8}
SUMMING = {"float64": 1e-13, "float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}
# Of x, base, mask and y; then of a and b.
PAIRS = [
    (activations, ports)
    for activations in ("float32", "float16", "bfloat16", "float64")
    for ports in ("float32", "float16", "bfloat16", "float64", "int8")
    if ports != "float64" or activations == "float64"
]


def dtype(name):
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def some_mask(rng, shape, kind, living=0.4):
    """Values of a mask, of which about the part `living` is not zero."""
    weights = rng.choice([1.0, 1.0, -0.5, 0.75], shape)
    return np.where(rng.random(shape) < living, weights, 0).astype(dtype(kind))


def some_call(pair, lead, sizes, mask, *, seed=0):
    """Inputs by name, with weights of a size that makes deltas near 1; `mask` is one, or the shape of one."""
    activations, ports = pair
    rank, d_in, d_out = sizes
    rng = np.random.default_rng(seed)
    feeds = {
        "base": rng.normal(size=(*lead, d_out)).astype(dtype(activations)),
        "x": rng.normal(size=(*lead, d_in)).astype(dtype(activations)),
    }
    sides = {"a": (rank, d_in), "b": (rank, d_out)}
    if ports == "int8":
        feeds |= {name: rng.integers(-127, 128, shape).astype(np.int8) for name, shape in sides.items()}
    else:
        fan_in = {"a": max(d_in, 1) ** 0.5, "b": max(rank, 1) ** 0.5}
        feeds |= {name: (rng.normal(size=s) / fan_in[name]).astype(dtype(ports)) for name, s in sides.items()}
    feeds["mask"] = some_mask(rng, mask, activations) if isinstance(mask, tuple) else mask.astype(dtype(activations))
    if ports == "int8":
        lengths = [60 * max(d_in, 1) ** 0.5, 60 * max(rank, 1) ** 0.5]
        feeds["scale"] = (rng.uniform(0.5, 1.5, (rank, 2)) / lengths).astype(np.float32)
    return feeds


def exact(feeds):
    return low_rank_add(**{name: array.astype(np.float64) for name, array in feeds.items()})


def assert_close(y, expected):
    assert y.shape == expected.shape
    name = y.dtype.name
    room = ROUNDING[name] * np.abs(expected) + SUMMING[name]
    worst = np.max(np.abs(y.astype(np.float64) - expected) / room, initial=0)
    assert worst <= 1, f"{worst:.2f} times what {name} may be off"
