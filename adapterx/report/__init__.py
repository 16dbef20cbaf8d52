"""Reports: what is in a model for adapters, as one HTML page that needs no network and no script."""

from __future__ import annotations

import os

from adapterx.atomic import atomic_write
from adapterx.report.measure import survey
from adapterx.report.page import page
from adapterx.report.survey import Survey

__all__ = ["Survey", "page", "survey", "write_page"]


def write_page(found: Survey, path: str | os.PathLike[str]) -> None:
    """Write ``found`` as HTML, whole or not at all.

    Raises:
        OSError: no such folder, no permission, disk full.
    """
    atomic_write(path, page(found).encode())
