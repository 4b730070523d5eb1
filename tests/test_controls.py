"""Control groups: their sizes, that they are distinct and drawn evenly, and what is refused."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from guda_fast.datasets import GroupedImages, with_controls


def data_of(images: int, **sizes: int) -> GroupedImages:
    """Groups that begin at the first image."""
    return GroupedImages(torch.zeros(images, 1, 2, 2), {name: torch.arange(size) for name, size in sizes.items()})


def test_controls_have_the_median_groups_size_and_come_after_the_groups() -> None:
    data = with_controls(data_of(30, a=2, b=7, c=4, d=20), 5)
    assert data.controls == tuple(f"control-{number}" for number in range(5))
    assert data.groups == ("a", "b", "c", "d", *data.controls)
    assert [len(data.group(name)) for name in data.controls] == [4] * 5  # the lower one of 4 and 7
    more = with_controls(data_of(30, a=2), 1, size=9)
    assert len(more.group("control-0")) == 9


def test_more_controls_begin_with_the_same_ones() -> None:
    data = data_of(30, a=8)
    few, many = with_controls(data, 3, seed=5), with_controls(data, 9, seed=5)
    assert all(torch.equal(few.group(name), many.group(name)) for name in few.controls)
    other = with_controls(data, 3, seed=6)
    assert not any(torch.equal(few.group(name), other.group(name)) for name in few.controls)


def test_controls_are_all_other_sets_where_all_are_asked_for() -> None:
    data = data_of(6, a=3, b=2)
    found = with_controls(data, math.comb(6, 3) - 1, size=3)
    sets = {tuple(found.group(name).tolist()) for name in found.controls}
    assert sets == set(combinations(range(6), 3)) - {(0, 1, 2)}
    with pytest.raises(ValueError, match="count must be at most 19, the other sets of 3 images, got 20"):
        with_controls(data, 20, size=3)


def test_every_image_is_drawn_equally_often() -> None:
    count, share = 400, 10 / 30
    data = with_controls(data_of(30, a=10), count)
    times = sum(torch.bincount(data.group(name), minlength=30) for name in data.controls)
    # Of 30 binomial counts one is off by five standard deviations with a probability of 2e-5.
    assert bool(((times - count * share).abs() < 5 * math.sqrt(count * share * (1 - share))).all())


def test_errors() -> None:
    data = data_of(6, a=3)
    for options, message in [
        ({"count": 0}, "count must be at least 1"),
        ({"count": 1, "size": 6}, "size must be between 1 and 5"),
        ({"count": 1, "size": 0}, "size must be between 1 and 5"),
        ({"count": 1, "seed": -1}, "seed must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            with_controls(data, **options)
    with pytest.raises(ValueError, match="data must have no group of a control's name, got control-0"):
        with_controls(with_controls(data, 1), 2)
    with pytest.raises(ValueError, match="data must have groups to be matched"):
        with_controls(GroupedImages(data.images, {}), 1)
    with pytest.raises(ValueError, match="size must be between 1 and 5, got 6"):
        with_controls(data_of(6, everything=6), 1)
