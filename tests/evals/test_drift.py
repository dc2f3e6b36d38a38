"""Drift against a naive computation, in its parts, and beside the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.evals.drift import drift, warning


def test_every_part_is_the_naive_norm():
    shapes = {
        "embed": {"embedding": (5, 4)},
        "layers": {"attn": {"q": {"kernel": (3, 4, 6)}}, "norm": {"scale": (3, 4)}},
        "final_norm": {"scale": (4,)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = np.random.default_rng(0)
    base, change = (
        jax.tree.map(lambda s: draw.normal(size=s).astype(np.float32), shapes, is_leaf=is_shape) for _ in range(2)
    )
    row = drift(base, jax.tree.map(lambda b, c: jnp.asarray(b + c), base, change), sigma=0.5, predicted=9.0)
    flat = np.concatenate([x.ravel() for x in jax.tree.leaves(change)])
    kernel, scale = change["layers"]["attn"]["q"]["kernel"], change["layers"]["norm"]["scale"]
    assert row["dim"] == len(flat) == 20 + 72 + 12 + 4
    assert row["norm"] == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    assert row["kappa"] == pytest.approx(row["norm"] / np.sqrt(len(flat)) / 0.5)
    assert row["ratio"] == pytest.approx(row["norm"] / 9)
    start = np.concatenate([x.ravel() for x in jax.tree.leaves(base)])
    assert row["relative"] == pytest.approx(np.linalg.norm(flat) / np.linalg.norm(start), rel=1e-5)
    assert row["largest"] == pytest.approx(np.abs(flat).max(), rel=1e-5)
    assert row["by_kind"]["attn/q/kernel"] == pytest.approx(np.linalg.norm(kernel), rel=1e-5)
    assert row["by_layer"]["layer 1"] == pytest.approx(np.hypot(*map(np.linalg.norm, (kernel[1], scale[1]))), rel=1e-5)
    assert sorted(row["by_layer"]) == ["embed", "final_norm", "layer 0", "layer 1", "layer 2"]
    for parts in (row["by_kind"], row["by_layer"]):
        assert np.sqrt(sum(x**2 for x in parts.values())) == pytest.approx(row["norm"])


@pytest.mark.parametrize(("ratio", "said"), [(1.0, False), (1.019, False), (0.979, True), (1.03, True)])
def test_the_warning_comes_beyond_two_percent(ratio, said):
    assert (warning({"step": 1, "norm": ratio, "predicted": 1.0, "ratio": ratio}) is not None) == said


def test_nothing_is_compared_where_nothing_is_predicted():
    row = drift({"w": jnp.zeros(2)}, {"w": jnp.ones(2)})
    assert row["ratio"] is None and row["kappa"] is None and row["relative"] is None
    assert warning({"step": 1, **row}) is None
