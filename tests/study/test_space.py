import math

import numpy as np
import pytest

from rafce_ray.study.space import Domain, combinations, condition_values, draw, in_order, parse_domain, same

EVERY = [
    {"grid": [0.3, 0.5]},
    {"choice": ["light", "none", None, True, [1, 2]]},
    {"uniform": [0.3, 0.7]},
    {"loguniform": [1e-4, 5e-3]},
    {"quniform": [0.3, 0.7, 0.1]},
    {"randint": [1, 4]},
    {"randint": [1, 4], "when": {"model.au_attention": [True], "loss.au_loss": ["bce", "asymmetric"]}},
]


@pytest.mark.parametrize("plain", EVERY)
def test_a_domain_is_written_as_it_was_read(plain):
    domain = parse_domain(plain)
    assert domain.to_plain() == plain
    assert parse_domain(domain.to_plain()) == domain


def test_ends_and_values_by_hand():
    assert parse_domain({"grid": [3, 1, 2]}).ends() == (3, 1, 2)
    assert parse_domain({"uniform": [0, 1]}).ends() == (0.0, 1.0)
    assert parse_domain({"randint": [1, 4]}).ends() == (1, 4)
    assert parse_domain({"randint": [1, 4]}).values() == range(1, 5)
    # Summed floats would give 0.30000000000000004 for the third step.
    assert parse_domain({"quniform": [0.1, 0.5, 0.1]}).values() == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert parse_domain({"quniform": [32, 96, 32]}).values() == (32, 64, 96)


def test_steps_of_whole_numbers_stay_whole_and_others_are_floats():
    assert [type(one) for one in Domain("quniform", (32, 96, 32)).values()] == [int, int, int]
    assert [type(one) for one in Domain("quniform", (0, 1, 0.5)).values()] == [float, float, float]


def test_only_real_ranges_are_continuous():
    finite = [parse_domain(plain).is_finite for plain in EVERY]
    assert finite == [True, True, False, False, True, True, True]
    with pytest.raises(ValueError, match=r"\{uniform: \[0.0, 1.0\]\} is continuous"):
        Domain("uniform", (0.0, 1.0)).values()


def test_samples_are_plain_values_inside_the_domain_and_reach_both_ends():
    rng = np.random.default_rng(0)
    whole = [Domain("randint", (1, 4)).sample(rng) for _ in range(200)]
    assert {type(one) for one in whole} == {int}
    assert set(whole) == {1, 2, 3, 4}
    stepped = [Domain("quniform", (0.0, 0.2, 0.1)).sample(rng) for _ in range(100)]
    assert set(stepped) == {0.0, 0.1, 0.2}
    assert {type(Domain("grid", (True, "a", None, 3)).sample(rng)) for _ in range(100)} == {bool, str, type(None), int}
    real = [Domain("loguniform", (1e-4, 1e-2)).sample(rng) for _ in range(2000)]
    assert {type(one) for one in real} == {float}
    assert all(1e-4 <= one <= 1e-2 for one in real)
    # Uniform in the logarithm: half of the draws lie below the geometric mean 1e-3, of uniform draws 9 %.
    assert np.mean(np.array(real) < 1e-3) == pytest.approx(0.5, abs=0.05)
    assert np.mean([Domain("uniform", (1e-4, 1e-2)).sample(rng) < 1e-3 for _ in range(2000)]) == pytest.approx(
        0.091, abs=0.03
    )


def test_the_same_generator_draws_the_same():
    for plain in EVERY:
        draws = [
            [parse_domain(plain).sample(rng) for _ in range(5)]
            for rng in (np.random.default_rng(3), np.random.default_rng(3))
        ]
        assert draws[0] == draws[1]


def test_what_a_domain_contains():
    assert Domain("uniform", (0.0, 1.0)).contains(1)
    assert not Domain("uniform", (0.0, 1.0)).contains(True)
    assert not Domain("uniform", (0.0, 1.0)).contains("0.5")
    assert Domain("randint", (0, 3)).contains(3)
    assert Domain("randint", (0, 3)).contains(3.0)
    assert not Domain("randint", (0, 3)).contains(2.5)
    assert not Domain("randint", (0, 3)).contains(True)
    assert Domain("choice", ([12, 6], None)).contains([12, 6])
    assert not Domain("choice", (1,)).contains(True)


def test_equal_values():
    assert same(1, 1.0)
    assert same([1, [2.0]], (1.0, [2]))
    assert not same(1, True)
    assert not same([0], [False])
    assert not same("1", 1)


@pytest.mark.parametrize(
    ("plain", "part"),
    [
        ([0.3, 0.5], "write {grid: [0.3, 0.5]} or {choice: [0.3, 0.5]}"),
        (0.3, "a single value belongs in the study's base"),
        ("tune.loguniform(1e-4, 1e-2)", "code is not run"),
        ({"eval": "1 + 1"}, "expressions are never run"),
        ({"grid_search": [1, 2]}, "write {grid: [1, 2]}"),
        ({"lognuiform": [1, 2]}, "did you mean 'loguniform'?"),
        ({"uniform": [0, 1], "grid": [1]}, "exactly one domain"),
        ({"when": {"a.b": [1]}}, "exactly one domain"),
        ({"grid": []}, "expected a list of values"),
        ({"grid": "light"}, "expected a list of values"),
        ({"choice": [1, 2.0, 2]}, "2 is listed twice"),
        ({"uniform": [1, 0]}, "low 1 is not below high 0"),
        ({"uniform": [0]}, "[low, high]"),
        ({"uniform": [0, math.inf]}, "finite numbers"),
        ({"uniform": [False, True]}, "finite numbers"),
        ({"loguniform": [0, 1]}, "more than 0"),
        ({"randint": [1.0, 4]}, "whole numbers"),
        ({"quniform": [0, 1]}, "[low, high, step]"),
        ({"quniform": [0, 1, 0.3]}, "do not reach 1"),
        ({"quniform": [0, 1, 0]}, "do not reach 1"),
        ({"grid": [1, 2], "when": {"a.b": 1}}, "expected other keys with lists"),
        ({"grid": [1, 2], "when": {"a.b": []}}, "expected other keys with lists"),
        ({"grid": [1, 2], "when": "a.b"}, "expected other keys with lists"),
    ],
)
def test_what_is_no_domain_is_refused_with_the_right_way_to_write_it(plain, part):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_domain(plain)
    assert part in str(caught.value)


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
