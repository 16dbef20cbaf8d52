"""One prefix between two sets of names, or none."""

import pytest

from adapterx.renaming import renaming


@pytest.mark.parametrize(
    ("given", "known", "renamed"),
    [
        (["h.0.q", "h.1.q"], ["model.h.0.q", "model.h.1.q"], ["model.h.0.q", "model.h.1.q"]),
        (["net.h.0.q"], ["h.0.q", "h.1.q"], ["h.0.q"]),
        # Where a name fits as it is, nothing is guessed for the others.
        (["q", "net.v"], ["q", "v"], ["q", "net.v"]),
        (["q"], ["text.q", "vision.q"], ["q"]),
        # A path that left out the containers: `a` is of one of them, `a_1` of the other.
        (["dec.a"], ["a", "a_1"], ["dec.a"]),
        (["dec.a.q", "dec.b.q"], ["a.q", "b.q", "a_1.q", "b_1.q"], ["dec.a.q", "dec.b.q"]),
        # Real names with numbers, which the adapter has too.
        (["net.fc", "net.fc_1"], ["fc", "fc_1"], ["fc", "fc_1"]),
    ],
)
def test_a_prefix_is_undone_only_where_a_single_one_explains_the_names(given, known, renamed):
    assert list(map(renaming(given, known), given)) == renamed
