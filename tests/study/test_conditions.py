import numpy as np
import pytest

from rafce_ray.study.conditions import combinations, condition_values, draw, in_order
from rafce_ray.study.space import parse_domain

BASE = {"a": 0, "b": 0, "c": 0, "d": "x"}


def parsed(**space):
    return {key: parse_domain(plain) for key, plain in space.items()}


def test_the_first_key_varies_slowest():
    space = parsed(a={"grid": [1, 2]}, b={"randint": [3, 5]})
    assert list(combinations(space, BASE)) == [{"a": a, "b": b} for a in (1, 2) for b in (3, 4, 5)]


def test_a_key_that_does_not_apply_does_not_multiply():
    space = parsed(a={"grid": [1, 2, 3]}, b={"grid": [7, 8], "when": {"a": [2]}})
    assert list(combinations(space, BASE)) == [{"a": 1}, {"a": 2, "b": 7}, {"a": 2, "b": 8}, {"a": 3}]


def test_every_condition_must_hold_and_the_base_counts_where_a_key_is_not_sampled():
    space = parsed(
        c={"grid": [1, 2], "when": {"b": [7], "d": ["x"]}},
        b={"grid": [7, 8], "when": {"a": [2]}},
        a={"grid": [1, 2]},
    )
    # c needs b, b needs a: with a = 1, b stays 0 and c is not sampled.
    assert list(combinations(space, BASE)) == [
        {"a": 1},
        {"a": 2, "b": 7, "c": 1},
        {"a": 2, "b": 7, "c": 2},
        {"a": 2, "b": 8},
    ]
    assert not any("c" in values for values in combinations(space, BASE | {"d": "y"}))


def test_a_condition_on_true_is_not_met_by_one():
    space = parsed(b={"grid": [7, 8], "when": {"a": [True]}})
    assert list(combinations(space, BASE | {"a": 1})) == [{}]
    assert list(combinations(space, BASE | {"a": True})) == [{"b": 7}, {"b": 8}]


def test_draws_are_among_the_combinations_and_conditions_come_first():
    space = parsed(b={"grid": [7, 8], "when": {"a": [2]}}, a={"grid": [1, 2, 3]})
    assert in_order(space) == ["a", "b"]
    possible = list(combinations(space, BASE))
    rng = np.random.default_rng(0)
    drawn = [draw(space, BASE, rng) for _ in range(100)]
    assert all(one in possible for one in drawn)
    assert all(one in drawn for one in possible)
    assert {type(one["a"]) for one in drawn} == {int}


def test_a_circle_is_an_error():
    space = parsed(a={"grid": [1, 2], "when": {"b": [1]}}, b={"grid": [1, 2], "when": {"a": [1]}}, c={"grid": [1]})
    with pytest.raises(ValueError, match="a, b depend on each other in a circle"):
        in_order(space)


def test_condition_values_are_the_first_that_hold_all_the_way_up():
    space = parsed(
        a={"grid": [1, 2]}, b={"grid": [7, 8], "when": {"a": [2, 1]}}, c={"grid": [1], "when": {"b": [8], "d": ["x"]}}
    )
    assert condition_values(space, "c") == {"a": 2, "b": 8, "d": "x"}
    assert condition_values(space, "a") == {}
