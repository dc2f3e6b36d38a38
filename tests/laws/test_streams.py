"""Random streams never meet: members, sampled tokens, and whatever is split off the same seed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.core import rng
from es_jax.es.noise import GaussianNoise
from es_jax.es.population import Population
from es_jax.models.transformer import Transformer, TransformerConfig
from es_jax.rundir.seed_log import read_entries
from es_jax.training.loop import run
from es_jax.training.weights_at import replay
from tests.helpers import config_of, edit_config, host, same

SEEDS = [0, 17, rng.MAX_SEED]
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def data(keys):
    return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


def counter(parent, child):
    """What was folded into `parent` to get `child`, two words: threefry's 20 rounds backwards."""
    mask, (a, b), (x, y) = 2**32 - 1, *(map(int, data(key)[0]) for key in (parent, child))
    schedule = [a, b, a ^ b ^ 0x1BD11BDA]
    for group in reversed(range(5)):
        x = (x - schedule[(group + 1) % 3]) & mask
        y = (y - schedule[(group + 2) % 3] - group - 1) & mask
        for turn in reversed(ROTATIONS[group % 2]):
            y ^= x
            y = (y >> turn | y << (32 - turn)) & mask
            x = (x - y) & mask
    return (x - schedule[0]) & mask, (y - schedule[1]) & mask


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_split_folds_in_is_its_index(seed):
    """So a purpose of 1 is the second key of every split of the seed."""
    root, children = rng.key(seed), jax.random.split(rng.key(seed), 50)
    assert [counter(root, child) for child in children] == [(0, i) for i in range(50)]
    assert (
        data(jax.vmap(lambda i: jax.random.fold_in(root, i))(np.arange(50, dtype=np.uint32))) == data(children)
    ).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("purpose", ["members", "sampling"])
def test_no_split_reaches_a_purpose(monkeypatch, purpose, seed):
    """A key's cipher is one-to-one, and what gives a purpose's key, backwards, is above all that a split counts."""
    roots = []
    monkeypatch.setattr(
        jax.random, "fold_in", lambda key, number, fold=jax.random.fold_in: roots.append(fold(key, number)) or roots[-1]
    )
    rng._step_key(seed, purpose, 3, rng.STREAMS)
    high, low = counter(rng.key(seed), roots[0])
    assert (high, 2**31 < low < 2**32 - 2**16) == (0, True)  # negative numbers that wrap round are out of reach, too


def init_keys(monkeypatch, seed):
    """All keys that initial weights are made of."""
    seen = [data(rng.key(seed))]
    for name in ("split", "fold_in"):
        call = getattr(jax.random, name)
        monkeypatch.setattr(jax.random, name, lambda *args, call=call: seen.append(call(*args)) or seen[-1])
    config = TransformerConfig(
        family="llama", vocab_size=16, width=8, layers=40, heads=2, kv_heads=1, head_dim=4, mlp_dim=8
    )
    Transformer(config).init(rng.key(seed))
    monkeypatch.undo()
    return {
        tuple(word)
        for keys in seen
        if not isinstance(keys, jax.core.Tracer)
        for word in np.asarray(keys if isinstance(keys, np.ndarray) else data(keys)).tolist()
    }


def run_keys(seed, streams, steps=range(64)):
    return {
        tuple(data(rng._step_key(seed, purpose, step, streams))[0].tolist())
        for purpose in ("members", "sampling")
        for step in steps
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_initial_weights_and_runs_of_one_seed_share_no_key(monkeypatch, seed):
    initial = init_keys(monkeypatch, seed)
    assert len(initial) > 40 and not initial & run_keys(seed, rng.STREAMS)
    assert len(run_keys(seed, rng.STREAMS)) == 128
    assert len(initial & run_keys(seed, 1)) == 40  # as it was: a step's members had the key of a layer


def test_streams_of_two_levels_of_splits_share_no_key():
    branches = jax.random.split(rng.key(5), 64)
    leaves = data(jax.vmap(lambda key: jax.random.split(key, 64))(branches))
    split = {tuple(word) for word in np.concatenate([data(branches), leaves]).tolist()}
    assert not split & run_keys(5, rng.STREAMS) and len(split & run_keys(5, 1)) == 128


def test_the_numbers_of_both_versions_stay():
    drawn = {streams: Population(3, seed=7, streams=streams).members(2).seed.tolist() for streams in (1, 2, 3)}
    assert drawn == {
        1: [3681106607, 3850510301, 1237987870],
        2: [641155183, 1117728953, 3141310704],
        3: [641155183, 1117728953, 3141310704],
    }
    assert Population(3, seed=7).members(2).seed.tolist() == drawn[3]


@pytest.mark.parametrize("streams", [0, 4, -1])
def test_streams_that_are_not_known_are_refused(streams):
    with pytest.raises(
        ValueError, match=f"^streams is {streams}: this version knows 1, 2, 3; use a newer es_jax for others$"
    ):
        Population(2, seed=0, streams=streams)


FIELDS = {
    "es": {"task": {"name": "conciseness", "train_size": 2}, "es": {"population": 2, "sigma": 0.05}},
    "grpo": {"method": "grpo", "task": {"name": "conciseness", "train_size": 2}, "grpo": {"rollouts": 2}},
}
LOOP = {
    "decode": {"max_prompt_tokens": 160, "max_new_tokens": 2, "slots": 2},
    "train": {"steps": 1, "checkpoint_every": 1},
    "evals": {"every": 0},
}


@pytest.mark.parametrize("method", FIELDS)
def test_a_run_from_before_goes_on_with_the_streams_it_began_with(monkeypatch, tiny_model, tmp_path, method):
    versions = []
    step_key = rng._step_key
    monkeypatch.setattr(rng, "_step_key", lambda *args: versions.append(args[-1]) or step_key(*args))
    fields = FIELDS[method] | LOOP
    run(config_of(tiny_model, fields), tmp_path)
    path = tmp_path / "config.json"
    assert json.loads(path.read_text())["streams"] == rng.STREAMS and set(versions) == {rng.STREAMS}
    edit_config(tmp_path, streams=None)
    versions.clear()
    run(config_of(tiny_model, fields, train={"steps": 2}), tmp_path)
    assert versions == [1] and json.loads(path.read_text()).get("streams", 1) == 1
    if method == "es":
        assert read_entries(tmp_path)[1].seeds == Population(2, seed=0, streams=1).members(2).seed.tolist()
    edit_config(tmp_path, streams=9)
    with pytest.raises(ValueError, match=r"streams is 9: this version knows 1, 2, 3;"):
        run(config_of(tiny_model, fields, train={"steps": 3}), tmp_path)


PAIRS = 15  # 1/30 is not a power of two, so products with it are rounded


def weights_of_pairs(noise):
    members = Population(2 * PAIRS, seed=0, antithetic=True).members(0)
    z = np.random.default_rng(1).standard_normal(2 * PAIRS).astype(np.float32)
    got = jax.jit(lambda z: noise.summands(members, z)[1])(jnp.asarray(z))
    return np.asarray(got), z[::2], z[1::2], np.float32(-1 / (2 * PAIRS))


def test_a_pair_is_weighed_with_the_bits_of_separate_operations():
    """Nothing that a compiler may fuse: a CPU and a GPU weigh its noise alike."""
    got, up, down, share = weights_of_pairs(GaussianNoise())
    np.testing.assert_array_equal(got, (up - down) * share)


def test_runs_of_before_weigh_a_pair_as_then():
    got, up, down, share = weights_of_pairs(GaussianNoise(pairs_scaled_first=True))
    np.testing.assert_allclose(got, up * share - down * share, rtol=0, atol=2e-8)
    assert (got != (up - down) * share).any()


def test_a_run_of_pairs_from_before_replays_as_it_was_trained(monkeypatch, tiny_model, tmp_path):
    fields = FIELDS["es"] | LOOP
    fields |= {
        "es": {"population": 6, "sigma": 0.05, "antithetic": True, "rewards": "random"},
        "optim": {"learning_rate": 0.5},
    }
    monkeypatch.setattr("es_jax.training.loop.rng.STREAMS", 2)
    before = host(run(config_of(tiny_model, fields, train={"steps": 2, "checkpoint_every": 9}), tmp_path / "2").params)
    monkeypatch.undo()
    now = host(run(config_of(tiny_model, fields, train={"steps": 2, "checkpoint_every": 9}), tmp_path / "3").params)
    assert [json.loads((tmp_path / name / "config.json").read_text())["streams"] for name in "23"] == [2, 3]
    for name, params in (("2", before), ("3", now)):
        shutil.rmtree(tmp_path / name / "ckpt")
        assert same(host(next(replay(tmp_path / name, steps=[2]))[1]), params)
    assert not same(before, now)
