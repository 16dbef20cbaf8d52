"""Faults: everything that is wrong with one file, told at once."""

from __future__ import annotations

import dataclasses

from adapterx.errors import FormatError

_SHOWN = 20


@dataclasses.dataclass(slots=True)
class Faults:
    """Collects faults and raises them as one error.

    Args:
        where: the file, as messages name it

    Example:
        >>> faults = Faults("a.npz")
        >>> faults.add("fc.lora_A.weight", "its other half is missing")
        >>> faults.refuse("broken adapter", advice="Export it again.")
        Traceback (most recent call last):
        adapterx.errors.FormatError: a.npz: broken adapter, 1 fault:
          fc.lora_A.weight: its other half is missing
        Export it again.
    """

    where: str
    found: list[str] = dataclasses.field(default_factory=list)

    def add(self, thing: str, cause: str) -> None:
        """Note that ``thing`` (a tensor, a key, a site) is wrong because of ``cause``."""
        told = f"{thing[:600]}: {cause}"
        self.found.append(told if told.isprintable() else ascii(told)[1:-1])

    def refuse(self, what: str, *, advice: str, error: type[FormatError] = FormatError) -> None:
        """Raise ``error`` with all faults, the first :data:`_SHOWN` in full; do nothing when there are none."""
        if not self.found:
            return
        shown = self.found[:_SHOWN]
        if len(self.found) > _SHOWN:
            shown.append(f"... and {len(self.found) - _SHOWN} more")
        count = f"{len(self.found)} fault{'s' if len(self.found) > 1 else ''}"
        raise error("\n  ".join([f"{self.where}: {what}, {count}:", *shown]) + f"\n{advice}")
