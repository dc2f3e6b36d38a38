"""KL: equal to a naive float64 computation, its two estimates agree, and [B, T, V] is never held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.core import chunked_map
from es_jax.evals import kl as module
from es_jax.evals.kl import averages, kl, sample, token_kl
from es_jax.generate import score
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer

CONFIG = TransformerConfig(
    family="llama", vocab_size=31, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=24,
    tied_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    base = jax.tree.map(lambda x: 2 * x, jax.jit(Transformer(CONFIG).init)(jax.random.key(0)))
    return base, jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(1), x.shape), base)


def naive(params, ids):
    logits = np.asarray(Transformer(CONFIG).apply(params, jnp.array([ids]))[0][0], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("held", [2**25, 200])  # all positions in one block, or three of them at a time
def test_it_is_the_naive_sum(models, held, monkeypatch):
    monkeypatch.setattr(chunked_map, "HELD", held)
    prompts, continuations = ([1, 2], [8, 9, 10]), ([3, 4, 5, 6, 7], [11])
    jax.clear_caches()
    got = kl(CONFIG, *models, prompts, continuations)
    sampled, exact = [], []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        ids, start = [*prompt, *continuation], len(prompt)
        p, q = (naive(params, ids)[start - 1 : -1] for params in models)
        sampled.append(np.mean([(p - q)[i, token] for i, token in enumerate(continuation)]))
        exact.append(np.mean((np.exp(p) * (p - q)).sum(axis=1)))
    assert got["kl"] == pytest.approx(np.mean(sampled), rel=1e-4)
    assert got["kl_exact"] == pytest.approx(np.mean(exact), rel=1e-4)
    assert got["kl_token"] == pytest.approx((5 * sampled[0] + sampled[1]) / 6, rel=1e-4)
    assert (got["n"], got["tokens"]) == (2, 6) and got["kl_exact"] > 0
    jax.clear_caches()


def test_the_estimates_agree_and_the_exact_one_varies_less(models):
    prompts = [[i % 30 + 1, i % 7] for i in range(96)]
    continuations = sample(CONFIG, models[0], prompts, stop_token_ids=(0,), slots=32, max_new_tokens=12)
    row = kl(CONFIG, *models, prompts, continuations)
    error = (row["kl_token_se"] ** 2 + row["kl_exact_token_se"] ** 2) ** 0.5
    assert abs(row["kl_token"] - row["kl_exact_token"]) < 4 * error
    assert 3 * row["kl_exact_token_se"] < row["kl_token_se"]
    assert kl(CONFIG, models[0], models[0], prompts, continuations)["kl"] == 0


def test_continuations_are_the_same_again_and_other_with_another_seed(models):
    prompts = [[1, 2, 3], [4], [5, 6]]
    first, again = (
        sample(CONFIG, models[0], prompts, stop_token_ids=(0,), slots=slots, max_new_tokens=9) for slots in (3, 2)
    )
    assert first == again
    assert sample(CONFIG, models[0], prompts, stop_token_ids=(0,), slots=3, max_new_tokens=9, seed=1) != first
    assert all(1 <= len(ids) <= 9 for ids in first)


@pytest.mark.parametrize("function", ["token_kl", "score_tokens", "its gradient"])
def test_the_logits_of_all_positions_are_never_held(models, function, monkeypatch):
    """No array of the program has the B · L · V numbers of the logits."""
    monkeypatch.setattr(chunked_map, "HELD", 2 * 4 * 31)
    jax.clear_caches()
    tokens, mask = jnp.ones((2, 64), jnp.int32), jnp.ones((2, 64), bool)
    program = {
        "token_kl": lambda: jax.make_jaxpr(lambda a, b: token_kl(CONFIG, a, b, tokens, mask))(*models),
        "score_tokens": lambda: jax.make_jaxpr(lambda a: score.score_tokens(CONFIG, a, tokens, mask))(models[0]),
        "its gradient": lambda: jax.make_jaxpr(jax.grad(lambda a: score.score_tokens(CONFIG, a, tokens, mask).sum()))(
            models[0]
        ),
    }[function]()
    largest = max(int(np.prod(shape)) for shape in _shapes(program.jaxpr) if 31 in shape)
    assert largest <= 2 * 4 * 31 * (1 if function == "score_tokens" else 2)
    jax.clear_caches()


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    yield from _shapes(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from _shapes(inner)


def test_standard_errors():
    row = averages("kl", np.array([1.0, 2.0, 6.0]), np.array([1.0, 1.0, 2.0]))
    assert row["kl"] == 2.0 and row["kl_se"] == pytest.approx(np.std([1, 2, 3], ddof=1) / 3**0.5)
    assert row["kl_token"] == 9 / 4
    assert row["kl_token_se"] == pytest.approx(np.sqrt((1.25**2 + 0.25**2 + 1.5**2) * 3 / 2) / 4)
    assert averages("kl", np.ones(1), np.ones(1))["kl_se"] is None
    assert module.WIDTH % 32 == 0
