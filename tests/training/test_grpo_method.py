"""The objective of GRPO: against numbers by hand, and against the formulas in torch on the model of transformers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.core.mesh import make_mesh
from es_jax.generate.engine import Engine
from es_jax.generate.sampling import Temperature
from es_jax.optim.chains import Chain
from es_jax.training import grpo
from es_jax.training.config_groups import AGGREGATIONS, GRPOConfig
from es_jax.training.grpo import Policy, Rows, group_relative, kl_k3, policy_loss, side_by_side, token_weights
from es_jax.weights import convert
from es_jax.weights.model import load_model

E = math.e


def test_the_ratio_is_clipped_on_both_sides_and_twice_where_the_advantage_is_negative():
    """By hand, ε = 0.2, upper 0.3, c = 3."""
    ratios = np.array([[1.0, 1.25, 1.5, 0.5, 4.0]], np.float32)
    old, g = np.zeros_like(ratios), GRPOConfig(clip_high=0.3)
    for advantage, losses, clipped, dual in (
        (2.0, [-2.0, -2.5, -2.6, -1.0, -2.6], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]),
        (-2.0, [2.0, 2.5, 3.0, 1.6, 6.0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]),
        (0.0, [0.0] * 5, [0] * 5, [0] * 5),
    ):
        out = policy_loss(jnp.log(ratios), jnp.array(old), jnp.array([advantage], jnp.float32), g)
        np.testing.assert_allclose(out[0][0], losses, rtol=1e-6)
        np.testing.assert_allclose(out[1], ratios, rtol=1e-6)
        assert out[2][0].tolist() == clipped and out[3][0].tolist() == dual


def test_log_ratios_and_the_divergence_are_clamped():
    g = GRPOConfig()
    far = jnp.array([[30.0, -30.0]])
    ratio = policy_loss(far, jnp.zeros((1, 2)), jnp.ones(1), g)[1]
    np.testing.assert_allclose(ratio[0], [E**20, E**-20], rtol=1e-5)
    k = jnp.array([[0.0, 1.0, -1.0, 5.0, -30.0]])
    by_hand = [0.0, E - 2, 1 / E, 10.0, 10.0]  # e⁵ − 6 and e⁻²⁰ + 19 are beyond the limit of 10
    np.testing.assert_allclose(kl_k3(jnp.zeros((1, 5)), k, g)[0], by_hand, atol=1e-6)
    np.testing.assert_allclose(kl_k3(jnp.zeros((1, 1)), k[:, 3:4], GRPOConfig(kl_limit=1e3))[0], [E**5 - 6], rtol=1e-6)


def test_every_aggregation_weighs_tokens_as_it_says():
    counted = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)  # the last row is empty: no sequence
    by_hand = {
        "token-mean": ([1 / 4] * 3, 1 / 4),
        "seq-mean-token-sum": ([1 / 2] * 3, 1 / 2),
        "seq-mean-token-mean": ([1 / 6] * 3, 1 / 2),
        "seq-mean-token-sum-norm": ([1 / 10] * 3, 1 / 10),
    }
    assert set(by_hand) == set(AGGREGATIONS)
    for name, (long, short) in by_hand.items():
        weights = token_weights(counted, name, max_new_tokens=5)
        np.testing.assert_allclose(weights, [[*long, 0], [short, 0, 0, 0], [0] * 4], rtol=1e-6)
        assert not token_weights(np.zeros((2, 3), bool), name, max_new_tokens=5).any()


def test_advantages_are_of_their_group_with_the_sample_deviation():
    rewards, groups = np.array([0.0, 1.0, 2.0, 5.0, 5.0, 5.0]), np.array([0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(group_relative(rewards, groups), [-1, 0, 1, 0, 0, 0], atol=2e-6)
    np.testing.assert_allclose(group_relative(3 * rewards, groups, scale=False), [-3, 0, 3, 0, 0, 0])
    np.testing.assert_allclose(group_relative(rewards, groups, eps=1.0), [-0.5, 0, 0.5, 0, 0, 0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("rollouts", 1), ("temperature", 0.0), ("dual_clip", 1.0), ("clip_low", 1.5), ("clip_high", -0.1),
     ("kl_coef", -1.0), ("mini_batch", 0), ("aggregation", "token_mean"), ("entropy", float("nan")), ("kl_limit", 0.0)],
)  # fmt: skip
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"grpo\.{field}"):
        GRPOConfig(**{field: value})


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model)


def policy_of(model, devices=8, **fields):
    engine = Engine(
        model.config, slots=4, max_prompt_tokens=64, max_new_tokens=8, stop_token_ids=(1,), sampler=Temperature(1.0)
    )
    mesh = make_mesh(devices=jax.devices()[:devices])
    return Policy(engine, mesh, jnp.dtype("float32"), Chain(), GRPOConfig(**({"micro_batch": 1} | fields)))


PROMPTS = [[5, 6, 7]] * 4 + [list(range(40, 75))] * 4
LENGTHS = np.array([8, 7, 0, 5, 8, 2, 1, 4])  # the third completion is empty
ADVANTAGE = group_relative(
    np.array([0.0, 1.0, 0.3, 2.0, 1.0, 1.0, 1.0, 1.0]), np.repeat([0, 1], 4)
)  # the second: equal


def rows_of(aggregation="token-mean", advantage=ADVANTAGE, far=2.5):
    """Eight rows with padding on both sides, and old and reference log-probabilities that reach every clip."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(2, 258, (8, 8)).astype(np.int32)
    tokens, positions, counted = side_by_side(PROMPTS, tokens, LENGTHS, max_prompt_tokens=64)
    old, reference = (-5.5 + far * draw.standard_normal(counted.shape).astype(np.float32) for _ in range(2))
    weight = token_weights(counted, aggregation, max_new_tokens=8)
    return Rows(tokens, positions, weight, advantage, old, reference)


def micro(rows, size):
    return jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, size, *x.shape[1:])), rows)


def gradient_of(policy, model, rows):
    cut = micro(rows, policy.micro_batch)
    program = jax.jit(policy.gradient)
    return program(model.params, cut, jnp.int32(len(cut.tokens)))


def in_torch(model, tiny_model, rows, g):
    """The loss and its gradients by name, from the formulas, one unpadded row at a time, in float64."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    loss, width = torch.zeros((), dtype=torch.float64), rows.weight.shape[1]
    for r, n in enumerate(LENGTHS):
        ids = torch.tensor(rows.tokens[r][rows.positions[r] >= 0].astype(np.int64))
        logits = net(ids[None]).logits[0] / g.temperature
        logp = torch.log_softmax(logits, -1)
        for t in range(n):
            place = len(ids) - n + t
            here, old, ref, a = logp[place - 1], rows.old[r, t], rows.reference[r, t], float(rows.advantage[r])
            ratio = torch.exp(torch.clamp(here[ids[place]] - old, -20, 20))
            inside = torch.clamp(ratio, 1 - g.clip_low, 1 + g.clip_high)
            policy = -torch.minimum(ratio * a, inside * a)
            policy = torch.minimum(policy, torch.tensor(-g.dual_clip * a)) if a < 0 else policy
            k = torch.clamp(ref - here[ids[place]], -20, 20)
            kl = torch.clamp(torch.exp(k) - k - 1, -10, 10)
            entropy = -(here.exp() * here).sum()
            loss = loss + float(rows.weight[r, t]) * (policy + g.kl_coef * kl - g.entropy * entropy)
    assert width >= LENGTHS.max()
    loss.backward()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    ("aggregation", "fields"),
    [("token-mean", {}), ("token-mean", {"kl_coef": 0.0}), ("seq-mean-token-mean", {"entropy": 0.1, "kl_coef": 0.5}),
     ("seq-mean-token-sum", {"clip_high": 0.4, "kl_coef": 0.1}), ("seq-mean-token-sum-norm", {"temperature": 0.7})],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_formulas_on_transformers_model(aggregation, fields, model, tiny_model):
    policy, rows = policy_of(model, **fields), rows_of(aggregation)
    gradient, sums = gradient_of(policy, model, rows)
    loss, reference = in_torch(model, tiny_model, rows, policy.grpo)
    assert float(sums["loss"]) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert float(sums["tokens"]) == LENGTHS.sum()
    assert 0 < float(sums["clip_fraction"]) < LENGTHS.sum() and float(sums["dual_clip_fraction"]) > 0
    _, tensor = convert.hf_tensors(gradient, config=model.config)
    for name, value in reference.items():
        scale = np.abs(value).max()
        assert scale > 1e-5, name
        np.testing.assert_allclose(np.asarray(tensor(name)), value, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_equal_rewards_give_no_gradient_and_no_nan(model):
    policy = policy_of(model, kl_coef=0.0)
    rows = rows_of(advantage=np.zeros(8, np.float32), far=30.0)
    gradient, sums = gradient_of(policy, model, rows)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert all(np.isfinite(float(value)) for value in sums.values())
    nothing = rows._replace(weight=np.zeros_like(rows.weight))
    gradient, sums = gradient_of(policy_of(model, entropy=0.1), model, nothing)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient)) and float(sums["loss"]) == 0


def test_padding_whatever_it_holds_changes_nothing(model):
    policy, rows = policy_of(model), rows_of()
    other = rows._replace(
        tokens=np.where(rows.positions >= 0, rows.tokens, 99), old=np.where(rows.weight > 0, rows.old, 7)
    )
    for a, b in zip(*(jax.tree.leaves(gradient_of(policy, model, r)) for r in (rows, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_micro_batches_and_meshes_give_the_same_gradient(model):
    rows = rows_of()
    whole = gradient_of(policy_of(model, devices=1, micro_batch=8), model, rows)
    for devices, size in ((1, 2), (2, 2), (8, 1)):
        other = gradient_of(policy_of(model, devices=devices, micro_batch=size), model, rows)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_micro_batches_behind_the_count_are_not_computed(model):
    policy, rows = policy_of(model, devices=1, micro_batch=4), rows_of()
    cut = micro(rows, 4)
    gradient = lambda n: jax.tree.leaves(jax.jit(policy.gradient)(model.params, cut, jnp.int32(n))[0])  # noqa: E731
    half = jax.tree.map(lambda x: x[:1], cut)
    first = jax.tree.leaves(jax.jit(policy.gradient)(model.params, half, jnp.int32(1))[0])
    assert all(np.array_equal(a, b) for a, b in zip(gradient(1), first, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(gradient(2), first, strict=True))


def test_logprobs_are_those_of_the_engine(model):
    policy = policy_of(model)
    engine = dataclasses.replace(policy.engine, logprobs=True)
    out = engine.generate(model.params, PROMPTS, key=jax.random.key(3))
    *arrays, counted = side_by_side(PROMPTS, np.asarray(out.tokens), np.asarray(out.length), max_prompt_tokens=35)
    cut = (jnp.asarray(x.reshape(1, 8, -1)) for x in arrays)
    ours = np.asarray(policy.logprobs(model.params, *cut, counted.shape[1]))[0]
    theirs = np.asarray(out.logprob)[:, : counted.shape[1]]
    np.testing.assert_allclose(np.where(counted, ours, 0), theirs, atol=1e-5)


def test_weights_and_moments_are_cut_over_the_devices_and_no_logits_are_held(model, monkeypatch):
    """The memory of the compiled gradient is below what the logits of one micro-batch alone would take."""
    wide = dataclasses.replace(model.config, vocab_size=8192)
    monkeypatch.setattr(grpo, "TOKENS_AT_ONCE", 64)
    engine = Engine(
        wide, slots=4, max_prompt_tokens=64, max_new_tokens=256, stop_token_ids=(1,), sampler=Temperature(1.0)
    )
    policy = Policy(engine, make_mesh(devices=jax.devices()[:1]), jnp.dtype("float32"), Chain(), GRPOConfig())
    params = jax.eval_shape(grpo.Transformer(wide).init, jax.random.key(0))
    shape = lambda kind, *dims: jax.ShapeDtypeStruct((2, 8, *dims), kind)  # noqa: E731
    i, f = jnp.int32, jnp.float32
    rows = Rows(shape(i, 320), shape(i, 320), shape(f, 256), shape(f), shape(f, 256), shape(f, 256))
    compiled = jax.jit(policy.gradient).lower(params, rows, jax.ShapeDtypeStruct((), i)).compile()
    logits = 8 * 256 * 8192 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 2
