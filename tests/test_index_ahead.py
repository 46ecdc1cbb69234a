"""Doing the next things meanwhile: the order stays, memory is bounded, an error ends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from actstore.index.ahead import ahead, behind


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_what_is_made_ahead_comes_in_order_and_few_at_a_time(n_threads: int) -> None:
    asked: list[int] = []

    def given() -> Iterator[int]:
        for number in range(20):
            asked.append(number)
            yield number

    taken = []
    for made in ahead(lambda number: number * number, given(), n_threads):
        taken.append(made)
        assert len(asked) <= len(taken) + n_threads
    assert taken == [number * number for number in range(20)]


def test_an_error_of_what_is_made_ahead_comes_in_its_place() -> None:
    made = ahead(lambda number: 12 // (3 - number), [0, 1, 2, 3, 4, 5], 2)
    assert [next(made) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_leaving_early_leaves_no_thread() -> None:
    before = threading.active_count()
    made = ahead(lambda number: number, range(100), 3)
    assert next(made) == 0
    made.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("n_waiting", [1, 4])
def test_what_is_used_behind_is_used_in_order_by_one_thread(n_waiting: int) -> None:
    used: list[tuple[int, int]] = []
    behind(lambda number: used.append((number, threading.get_ident())), range(50), n_waiting)
    assert [number for number, _ in used] == list(range(50))
    assert len({thread for _, thread in used}) == 1 and used[0][1] != threading.get_ident()


@pytest.mark.parametrize("n_waiting", [1, 3])
def test_so_many_are_made_while_one_is_used_and_no_more(n_waiting: int) -> None:
    made: list[int] = []
    may_end = threading.Event()

    def making() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            if number == n_waiting:  # asked for while the first is still in use
                may_end.set()
            yield number

    def use(number: int) -> None:
        assert may_end.wait(10)
        assert len(made) <= number + n_waiting + 1

    behind(use, making(), n_waiting)
    assert made == list(range(20))


@pytest.mark.parametrize("n_waiting", [1, 4])
@pytest.mark.parametrize("place", [0, 3, 9], ids=["first", "between", "last"])
def test_an_error_of_what_is_used_behind_ends_it(place: int, n_waiting: int) -> None:
    used: list[int] = []

    def use(number: int) -> None:
        if number == place:
            raise ZeroDivisionError
        used.append(number)

    with pytest.raises(ZeroDivisionError):
        behind(use, range(10), n_waiting)
    assert used == list(range(place))
