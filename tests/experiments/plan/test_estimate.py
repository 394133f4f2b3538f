"""Roofline times and totals."""

import pytest

from experiments.plan.chips import Chip
from experiments.plan.estimate import Line, SearchWork, Work, largest_batch

CHIP = Chip("x", "x", memory=100, bandwidth=10, flops=1000, interconnect=5, source="made up")


def test_time_is_the_slower_of_arithmetic_and_memory_and_the_interconnect_on_top():
    assert Work(2000, 10).seconds(CHIP) == 2
    assert Work(2000, 30).seconds(CHIP) == 3
    assert Work(2000, 30, 10).seconds(CHIP) == 5
    assert [Work(*x).bound(CHIP) for x in ((9000, 1, 1), (1, 90, 1), (1, 1, 9))] == [
        "arithmetic",
        "memory",
        "interconnect",
    ]


def test_work_adds_up():
    assert Work(1, 2, 3) + 2 * Work(4, 5, 6) - Work(1, 1, 1) == Work(8, 11, 14)


def seconds(value):
    """Work that takes so long."""
    return Work(memory=10 * value)


def test_a_search_is_its_prefills_and_its_chunks():
    work = SearchWork(
        prefill=seconds(100),
        token=seconds(1),
        commit=seconds(2),
        sample=seconds(3),
        value_prefill=seconds(50),
        value_chunk=seconds(4),
        value_commit=seconds(5),
        gradient=seconds(6),
        optimizer=seconds(7),
    )
    # Ten tokens are three chunks of four; each takes 4 tokens, a commit, and two values of 4 + 5.
    assert work.search_seconds(10, 4, 2, CHIP) == 100 + 2 * 50 + 3 * (4 * 1 + 2 + 2 * 9)
    assert work.sampling_seconds(10, CHIP) == 100 + 10 * 3
    assert work.update_seconds(8, CHIP) == 8 * 6 + 7


def test_device_hours():
    assert Line("stage", units=10, seconds=720).hours(16) == 32


@pytest.mark.parametrize(
    ("limit", "multiple", "expected"), [(100, 4, 36), (100, 8, 32), (10, 4, 0), (28, 4, 0)]
)
def test_the_largest_batch_lies_on_the_line(limit, multiple, expected):
    # 20 bytes and 2.2 more for each prompt.
    assert largest_batch((4, 8), (28.8, 37.6), limit, multiple) == expected


def test_memory_that_does_not_grow_is_refused():
    with pytest.raises(ValueError, match="More prompts must take more memory"):
        largest_batch((4, 8), (10, 10), 100, 4)
