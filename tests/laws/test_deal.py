"""The laws of members that see a few of a step's prompts each, and are compared with others on the same ones."""

import logging
import re
from fractions import Fraction

import numpy as np
import pytest

from es_jax.es.population import Population, check_deal
from es_jax.es.shaping import SHAPINGS, centered_rank, centred_on_prompts, z_score
from es_jax.training.config import freeze

# population, prompts, prompts a member, antithetic, members a prompt
DEALS = [
    (4, 2, 1, False, 2),
    (16, 2, 1, False, 8),
    (6, 4, 2, False, 3),
    (512, 64, 1, False, 8),
    (10, 6, 3, False, 5),
    (5, 4, 4, False, 5),
    (8, 2, 1, True, 4),
    (12, 6, 4, True, 8),
    (24, 4, 1, True, 6),
]
REFUSED = [  # population, prompts, prompts a member, antithetic
    (8, 12, 7, False),
    (30, 8, 3, False),
    (8, 8, 1, False),
    (6, 4, 5, False),
    (7, 10, 1, False),
    (12, 6, 1, True),
    (8, 6, 1, True),
    (6, 4, 9, True),
]
every_deal = pytest.mark.parametrize(("population", "prompts", "each", "antithetic", "group"), DEALS)


def deal(population, prompts, each, antithetic, *, seed=3, step=1):
    return Population(population, seed=seed, antithetic=antithetic).deal(step, prompts, each)


def spread_rewards(seen, prompts, seed=0):
    """Rewards [N, k] of prompts of different difficulty."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=seen.shape) + 10 * draw.normal(size=prompts)[seen]


@every_deal
def test_every_prompt_is_seen_equally_often_and_by_no_member_twice(population, prompts, each, antithetic, group):
    for step in (1, 2, 3):
        seen = deal(population, prompts, each, antithetic, step=step)
        assert seen.shape == (population, each)
        assert np.bincount(seen.ravel(), minlength=prompts).tolist() == [group] * prompts
        assert all(len(set(row)) == each for row in seen.tolist())
        if antithetic:
            assert np.array_equal(seen[::2], seen[1::2])


def test_a_deal_is_a_function_of_seed_and_step():
    same = [deal(64, 16, 1, False) for _ in range(2)]
    others = [deal(64, 16, 1, False, seed=4), deal(64, 16, 1, False, step=2)]
    assert np.array_equal(*same) and not any(np.array_equal(same[0], other) for other in others)
    partners = {tuple(np.flatnonzero(seen[:, 0] == 0)) for seen in (deal(8, 4, 1, False, step=t) for t in range(40))}
    assert len(partners) == 4  # prompt 0 is seen by each of the places of a deal sooner or later


@pytest.mark.parametrize(("population", "prompts", "each", "antithetic"), REFUSED)
def test_a_refusal_names_the_nearest_numbers_that_work(population, prompts, each, antithetic):
    with pytest.raises(ValueError, match=rf"es\.prompts_per_member is {each} with es\.population = {population}") as e:
        freeze(
            {
                "es": {"population": population, "prompts_per_member": each, "antithetic": antithetic},
                "task": {"prompts_per_step": prompts},
            }
        )
    found = re.search(r"; set it to ([\d or]+)(?:, or es\.population to ([\d or]+))?$", str(e.value))
    named, sizes = ([int(x) for x in (words or "").split(" or ") if x] for words in found.groups())
    assert named == nearest(each, [k for k in range(1, 2 * prompts) if accepted(population, prompts, k, antithetic)])
    assert sizes == nearest(
        population, [n for n in range(2, population + 10 * prompts) if accepted(n, prompts, each, antithetic)]
    )
    assert bool(sizes) == (each <= prompts)
    for other in named:
        deal(population, prompts, other, antithetic)
    for other in sizes:
        deal(other, prompts, each, antithetic)


def nearest(value, known):
    return sorted(known, key=lambda other: (abs(other - value), other))[:3]


def accepted(population, prompts, each, antithetic):
    """Whether it is dealt, which must be so where all prompts are seen equally often and often enough."""
    group = Fraction(population * each, prompts)
    even = not antithetic or (group % 2 == 0 and group >= 4 and population % 2 == 0)
    works = each <= prompts and group.denominator == 1 and group >= 2 and even
    try:
        check_deal(population, prompts, each, antithetic=antithetic)
    except ValueError:
        assert not works
        return False
    assert works
    return True


@pytest.mark.parametrize(("each", "sizes"), [(1, "12 or 18 or 24"), (2, "6 or 12 or 18"), (3, "4 or 6 or 8")])
def test_a_single_pair_cannot_be_dealt_to(each, sizes):
    with pytest.raises(ValueError, match=rf"at least 4 members, .*; set es\.population to {sizes}$"):
        freeze(
            {
                "es": {"population": 2, "prompts_per_member": each, "antithetic": True},
                "task": {"prompts_per_step": 3},
            }
        )


def test_without_prompts_per_step_all_training_prompts_count():
    fields = {"es": {"population": 8, "prompts_per_member": 1}}
    with pytest.raises(
        ValueError,
        match=r"8 × 1 / 6 members would see it; set it to 3 or 6, or es\.population to 12 or 18 or 24",
    ):
        freeze(fields | {"task": {"train_size": 6}})
    freeze(fields | {"task": {"train_size": 6, "prompts_per_step": 4}})


@every_deal
def test_weights_sum_to_zero_and_their_squares_to_the_population(population, prompts, each, antithetic, group):
    seen = deal(population, prompts, each, antithetic)
    score = centred_on_prompts(spread_rewards(seen, prompts), seen)
    assert abs(score.sum()) < 1e-9
    z = z_score(score).astype(float)
    assert abs(z.sum()) < 1e-5 * population and np.square(z).sum() == pytest.approx(population, rel=1e-6)


@every_deal
def test_what_is_shaped_is_how_much_better_a_member_was_than_others(population, prompts, each, antithetic, group):
    seen = deal(population, prompts, each, antithetic)
    rewards, expected = spread_rewards(seen, prompts), np.zeros(population)
    for j in range(prompts):
        mean = rewards[seen == j].mean()
        expected += np.where(seen == j, rewards - mean, 0).sum(axis=1) / each
    score = centred_on_prompts(rewards, seen)
    np.testing.assert_allclose(score, expected, atol=1e-10)
    ranks = np.argsort(np.argsort(expected)) / (population - 1) - 0.5
    np.testing.assert_allclose(centered_rank(score), ranks, atol=1e-7)
    easier = rewards + 100 * np.arange(prompts)[seen]
    np.testing.assert_allclose(centred_on_prompts(easier, seen), score, atol=1e-9)


@every_deal
def test_the_expected_step_is_that_of_the_rewards_less_a_part_in_the_members_of_a_prompt(
    population, prompts, each, antithetic, group
):
    """For rewards gⱼ·εₙ, Σ sₙ εₙ is a quadratic form in ε, whose expectation is the sum of s's slopes in the member's
    own rewards, and in those of its partner, whose noise is the opposite."""
    seen = deal(population, prompts, each, antithetic)
    slopes, total = np.random.default_rng(1).uniform(1, 2, prompts), 0.0  # g of each prompt
    for n in range(min(population, 64)):
        for j in range(each):
            unit = np.zeros(seen.shape)
            unit[n, j] = slopes[seen[n, j]]
            score = centred_on_prompts(unit, seen)
            total += score[n] - (score[n ^ 1] if antithetic else 0)
    uncentred = slopes[seen[: min(population, 64)]].sum() / each
    assert total / uncentred == pytest.approx(1 if antithetic else 1 - 1 / group, rel=1e-9)


@pytest.mark.parametrize(("prompts", "group"), [(8, 2), (2, 8)])
def test_the_mean_of_many_steps_is_less_by_a_part_in_the_members_of_a_prompt(prompts, group):
    """Over 800 steps of 16 members in two dimensions; the mean's own error is about .02."""
    draw, gradient, mean = np.random.default_rng(2), np.array([1.0, -0.5]), np.zeros(2)
    for t in range(800):
        seen, noise = deal(16, prompts, 1, False, step=t), draw.normal(size=(16, 2))
        rewards = (noise @ gradient)[:, None] + 7.0 * np.arange(prompts)[seen]
        mean += centred_on_prompts(rewards, seen) @ noise / (16 * 800)
    np.testing.assert_allclose(mean, (1 - 1 / group) * gradient, atol=0.05)


@pytest.mark.parametrize("shape", sorted(SHAPINGS))
@pytest.mark.parametrize("rewards", [(0.1, 0.7), (1 / 3, -0.9), (1e-3, 1e6)])
def test_rounding_ranks_nobody(rewards, shape, caplog):
    """Three members on each prompt with one reward: their mean is not exactly that reward."""
    seen = np.array([[0], [0], [0], [1], [1], [1]])
    with caplog.at_level(logging.WARNING):
        weights = SHAPINGS[shape](centred_on_prompts(np.array(rewards)[seen], seen))
    assert not weights.any() and (shape != "z_score" or "all 6 rewards are equal" in caplog.text)


def test_members_that_did_equally_well_have_one_rank():
    """Each is 0.3 above, at and below the mean of its prompt, in numbers that are not binary."""
    seen = np.repeat(np.arange(3), 3)[:, None]
    rewards = np.array([0.1, 0.4, 0.7] * 3)[:, None] + np.array([0.0, 1.1, -5.3])[seen]
    assert len(set(centered_rank(centred_on_prompts(rewards, seen)).tolist())) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", sorted(SHAPINGS))
def test_a_score_that_is_not_finite_makes_its_member_the_worst(shape, bad):
    """On a prompt that is easy, and beside scores that are good; and it is in no mean."""
    seen = deal(6, 4, 2, False)
    rewards = spread_rewards(seen, 4)
    rewards[4, 1] = bad
    score = centred_on_prompts(rewards, seen)
    with pytest.raises(ValueError, match=r"not finite for member 4 \(-?(nan|inf)\) of 6"):
        SHAPINGS[shape](score)
    weights = SHAPINGS[shape](score, nan_rewards="worst")
    assert weights[4] == weights.min() and (weights == weights.min()).sum() == 2
    assert weights.sum() == pytest.approx(0, abs=1e-5)
    others = np.delete(np.arange(6), 4)
    assert np.array_equal(score[others], centred_on_prompts(rewards[others], seen[others]))
    with pytest.raises(ValueError, match="members 0"):
        SHAPINGS[shape](centred_on_prompts(np.full((6, 2), bad), seen), nan_rewards="worst")
