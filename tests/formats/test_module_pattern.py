"""Patterns fit what PEFT's regular expression fits, and never take long about it."""

import contextlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapterx.formats.module_pattern import Budget, ModulePattern, PatternError

ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "(a|b)", "(?:ab|b.)", "(a*b)", "^", "$", "(a+)+", "(b|)"]
REPEATS = ["", "", "", "*", "+", "?", "*?", "{2}", "{0,2}", "{,2}", "{1,}"]
PIECES = st.lists(st.tuples(st.sampled_from(ATOMS), st.sampled_from(REPEATS)).map("".join), min_size=1, max_size=4)


@given(PIECES.map("".join), st.sampled_from(["", "|a", "|b.*"]), st.text("ab.1", max_size=8))
@example("a{2}", "", "a")
@example("a{2,3}", "", "b.aaaa")
@example("(.a){0,3}", "|b.*", "a.b1")
def test_a_pattern_fits_what_peft_matches(start: str, end: str, name: str) -> None:
    pattern = start + end
    try:
        expected = re.match(rf"(.*\.)?({pattern})$", name)
    except re.error:
        return
    if re.search(r"[*+}?]\+", pattern):
        # What re takes and we do not: an atomic repeat, which forgets the other ways it could have gone.
        with pytest.raises(PatternError, match="a repeat of a repeat"):
            ModulePattern.parse(pattern)
        return
    assert ModulePattern.parse(pattern).fits(name, Budget()) is (expected is not None)


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        (r"(?=a)a", "only plain groups"),
        (r"(a)\1", "escape"),
        (r"(?i)a", "only plain groups"),
        ("(a", "without its '\\)'"),
        ("a)", "without its '\\('"),
        ("*a", "nothing to repeat"),
        ("[a", "ends too early"),
        ("a{600}", "repeated 600"),
        ("a{3,2}", "repeated 3 to 2"),
        ("[b-a]", "malformed range"),
        ("(" * 20 + ")" * 20, "deep"),
        ("a" * 600, "characters long"),
    ],
)
def test_what_is_outside_the_grammar_is_refused_with_the_cause(pattern: str, cause: str) -> None:
    with pytest.raises(PatternError, match=cause):
        ModulePattern.parse(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(a*)*b", ".*" * 100 + "b", "(((a{512}){512}){512}){512}", "((^{512}){512}){512}"]
)
def test_patterns_that_explode_elsewhere_take_a_bounded_number_of_steps(pattern: str) -> None:
    budget = Budget(200_000)
    with contextlib.suppress(PatternError):
        ModulePattern.parse(pattern).fits("a" * 200 + "!", budget)
    assert budget.steps > -1000


def test_a_repeat_that_moves_nowhere_is_counted_too() -> None:
    with pytest.raises(PatternError, match="too many steps"):
        ModulePattern.parse("((^{512}){512}){512}").fits("a", Budget(10_000))
