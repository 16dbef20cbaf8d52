"""Patterns of module names, as ``rank_pattern`` and ``alpha_pattern`` of a PEFT config use them.

PEFT hands each pattern to a backtracking regular expression engine, which a config from elsewhere can keep busy
for ever. Here all positions that a prefix of the pattern can reach are followed together, so that work is bounded by
pattern times name, and counted. The grammar is the regular part of Python's: literals, ``.``, classes, escapes,
groups, ``|``, ``* + ? {m,n}``, ``^`` and ``$``. Lookaround, back references and flags are refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Set
from typing import NoReturn

Positions = Set[int]
_Step = Callable[["_Name", Positions], Positions]

_LONGEST = 512
_DEEPEST = 16
_MOST_REPEATS = 512
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "D": lambda char: not char.isdecimal(),
    "w": lambda char: char.isalnum() or char == "_",
    "W": lambda char: not (char.isalnum() or char == "_"),
    "s": str.isspace,
    "S": lambda char: not char.isspace(),
}
_BOUNDS = re.compile(r"\{(\d{0,4})(?:(,)(\d{0,4}))?\}")


class PatternError(ValueError):
    """A pattern that is not a regular expression, is outside the grammar, or takes too much work."""


@dataclasses.dataclass(slots=True)
class Budget:
    """Steps that matching may still take, shared by all patterns of one config."""

    steps: int = 1_000_000

    def spend(self, steps: int) -> None:
        """Take ``steps`` away.

        Raises:
            PatternError: nothing is left.
        """
        self.steps -= steps
        if self.steps < 0:
            raise PatternError("matching it takes too many steps; use plain module names")


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    text: str
    budget: Budget


@dataclasses.dataclass(frozen=True, slots=True)
class ModulePattern:
    r"""A pattern that fits a whole module name, or its end after a dot, as in PEFT.

    Example:
        >>> pattern = ModulePattern.parse(r"layers\.[0-3]\.(q|k)_proj")
        >>> pattern.fits("model.layers.2.k_proj", Budget()), pattern.fits("model.layers.7.k_proj", Budget())
        (True, False)
    """

    text: str
    step: _Step

    @classmethod
    def parse(cls, text: str) -> ModulePattern:
        """Read a pattern.

        Raises:
            PatternError: it is malformed, or outside the grammar.
        """
        return cls(text, _Parser(text).whole())

    def fits(self, name: str, budget: Budget) -> bool:
        """Whether the pattern fits ``name``.

        Raises:
            PatternError: the budget is spent.
        """
        budget.spend(1)
        starts = {0} | {at + 1 for at, char in enumerate(name) if char == "."}
        return len(name) in self.step(_Name(name, budget), starts)


class _Parser:
    """Turns the text of a pattern into one step: from positions in a name to the positions after it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def whole(self) -> _Step:
        if len(self.text) > _LONGEST:
            self.fail(f"over {_LONGEST} characters long")
        step = self.choice()
        if self.at < len(self.text):
            self.fail("a ')' without its '('")
        return step

    def fail(self, cause: str) -> NoReturn:
        raise PatternError(f"{cause}, at character {self.at}")

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def take(self, text: str) -> bool:
        found = self.peek(text)
        self.at += len(text) * found
        return found

    def next(self) -> str:
        if self.at == len(self.text):
            self.fail("it ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def choice(self) -> _Step:
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        return branches[0] if len(branches) == 1 else _any(branches)

    def sequence(self) -> _Step:
        steps: list[_Step] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            steps.append(self.repeated(self.atom()))

        def follow(name: _Name, at: Positions) -> Positions:
            for step in steps:
                if not at:
                    break
                at = step(name, at)
            return at

        return follow

    def atom(self) -> _Step:
        char = self.next()
        match char:
            case "(":
                return self.group()
            case "[":
                return _one(self.char_class())
            case ".":
                return _one(lambda _: True)
            case "^":
                return lambda _, at: at & {0}
            case "$":
                return lambda name, at: at & {len(name.text)}
            case "\\":
                return _one(self.escape())
            case "*" | "+" | "?":
                self.fail("nothing to repeat")
        return _one(char.__eq__)

    def group(self) -> _Step:
        self.depth += 1
        if self.depth > _DEEPEST:
            self.fail(f"groups over {_DEEPEST} deep")
        if self.peek("?") and not self.take("?:"):
            self.fail("only plain groups and (?:...) are taken")
        step = self.choice()
        if not self.take(")"):
            self.fail("a '(' without its ')'")
        self.depth -= 1
        return step

    def escape(self) -> Callable[[str], bool]:
        char = self.next()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum():
            self.fail(f"the escape \\{char} is not taken")
        return char.__eq__

    def char_class(self) -> Callable[[str], bool]:
        negated = self.take("^")
        tests: list[Callable[[str], bool]] = []
        # A bracket that comes first is one of the characters.
        while not tests or not self.take("]"):
            first = self.next()
            if first == "\\":
                tests.append(self.escape())
            elif self.peek("-") and not self.peek("-]"):
                self.next()
                tests.append(_between(first, self.next()))
            else:
                tests.append(first.__eq__)
        return lambda char: any(test(char) for test in tests) is not negated

    def repeated(self, step: _Step) -> _Step:
        low, high = 1, 1
        if self.take("*"):
            low, high = 0, -1
        elif self.take("+"):
            low, high = 1, -1
        elif self.take("?"):
            low = 0
        elif (match := _BOUNDS.match(self.text, self.at)) and (match[1] or match[2]):
            self.at = match.end()
            low = int(match[1] or 0)
            high = low if not match[2] else int(match[3] or -1)
        else:
            return step
        if max(low, high) > _MOST_REPEATS or -1 < high < low:
            self.fail(f"repeated {low} to {high} times")
        # A lazy repeat finds another of the same matches. A possessive one does not, and neither does a double one.
        if not self.take("?") and (self.peek("*") or self.peek("+") or _BOUNDS.match(self.text, self.at)):
            self.fail("a repeat of a repeat")
        return _repeat(step, low, high)


def _any(branches: list[_Step]) -> _Step:
    def step(name: _Name, at: Positions) -> Positions:
        return {end for branch in branches for end in branch(name, at)}

    return step


def _one(test: Callable[[str], bool]) -> _Step:
    def step(name: _Name, at: Positions) -> Positions:
        name.budget.spend(len(at))
        return {here + 1 for here in at if here < len(name.text) and test(name.text[here])}

    return step


def _between(first: str, last: str) -> Callable[[str], bool]:
    if last == "\\" or last < first:
        raise PatternError(f"a malformed range {first}-{last}")
    return lambda char: first <= char <= last


def _repeat(step: _Step, low: int, high: int) -> _Step:
    """``low`` to ``high`` times, without end where ``high`` is -1."""

    def repeated(name: _Name, at: Positions) -> Positions:
        reached = set(at) if low == 0 else set()
        rounds = 0
        while at and rounds != high:
            # A round costs something even when it is one of anchors only.
            name.budget.spend(1)
            at = step(name, at)
            rounds += 1
            if rounds >= low:
                # Who came here in fewer rounds has been wherever this one could go.
                at = at - reached
                reached |= at
        return reached

    return repeated
