"""Results come in order, one item ahead, and errors where they belong."""

import threading

import pytest

from adapterx.ahead import ahead


def test_the_next_item_is_worked_on_while_the_last_result_is_used():
    started = [threading.Event() for _ in range(3)]

    def work(i):
        started[i].set()
        return i

    for i in ahead(work, range(3)):
        if i < 2:
            assert started[i + 1].wait(10)
        assert not any(event.is_set() for event in started[i + 2 :])


def test_an_error_is_raised_in_the_place_of_its_result():
    def work(i):
        return 1 / i

    results = ahead(work, [2, 1, 0, 1])
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
