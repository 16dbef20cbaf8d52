"""Every error that adapterx raises on purpose.

::

    AdapterxError
    +-- FormatError (ValueError)         a file is broken, too large, or not what it says it is
    |   +-- UnsupportedAdapter           the file is whole, but holds what we cannot apply exactly
    |   +-- UnsupportedQuantization      the checkpoint is whole, but has an encoding that we cannot hold exactly
    +-- ModelError (ValueError)          an ONNX model is broken, unsafe, or cannot be rewritten
    |   +-- NoAdaptersFound (LookupError) the model has no adapter that we may take
    +-- MismatchError (ValueError)       adapter and model (or a and b) do not belong together
    +-- UnknownAdapter (LookupError)     no adapter of that name in this session
    +-- FeedError (ValueError)           feeds or output names that the model does not have, or lacks
    +-- OptionError (ValueError)         an option that does not exist, or not with this value
    +-- MissingDependency (ImportError)  an extra that has to be installed first

Each message names the thing, what was expected, what was met, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdapterxError(Exception):
    """The root: catch this one to catch them all."""


class FormatError(AdapterxError, ValueError):
    """A file is broken, too large, or not what it says it is."""


class UnsupportedAdapter(FormatError):
    """A whole and readable adapter whose arithmetic we cannot reproduce exactly."""


class UnsupportedQuantization(FormatError):
    """A whole and readable quantized checkpoint with an encoding that we cannot hold without loss."""


class ModelError(AdapterxError, ValueError):
    """An ONNX model is broken, unsafe to open, or cannot be rewritten."""


class NoAdaptersFound(ModelError, LookupError):
    """The model holds no adapter that may be taken; the message says what was looked at."""


class MismatchError(AdapterxError, ValueError):
    """Two things that do not belong together: adapter and model, or two halves of a site."""


class UnknownAdapter(AdapterxError, LookupError):
    """The session has no adapter of that name."""


class FeedError(AdapterxError, ValueError):
    """Feeds or output names that the model does not have, or that it needs and did not get."""


class OptionError(AdapterxError, ValueError):
    """An option that does not exist, or that does not take this value."""


class MissingDependency(AdapterxError, ImportError):
    """An optional package is needed; the message says what to install."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; nearest is X"`` for the known name most like ``name``, or ``""`` when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; nearest is {close[0]}" if close else ""
