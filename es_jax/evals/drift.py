"""How far the weights are from the base weights: in total, by layer, by kind of matrix, and against the closed form."""

import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from es_jax.core import processes
from es_jax.core.tree import count, named_leaves

TOLERANCE = 0.02  # of measured / predicted; outside of it precision was lost
LAYERS = "layers/"  # leaves under it hold one matrix per layer, stacked on the first axis


def drift(
    base: Any, now: Any, *, sigma: float | None = None, predicted: float | None = None, dim: int | None = None
) -> dict[str, Any]:
    """‖θ − θ₀‖ and its parts.

    Args:
      base, now: θ₀ and θ, trees with the same structure; leaves under "layers/" are stacked over the layers.
      sigma: σ, for κ.
      predicted: the norm in exact arithmetic, if it is known.
      dim: d, if not all weights get noise.

    Returns:
      norm; relative, norm / ‖θ₀‖; rms, norm / √d, the drift of a weight; kappa, rms / σ; dim, d; largest, the largest
        |entry| of θ − θ₀, and largest_in, its leaf; predicted, and ratio = norm / predicted (None at 0); by_layer and
        by_kind, each part's norm; by_kind_relative, each part's norm / its norm in θ₀.

    Raises ValueError that names the leaves if weights are not finite.

    >>> row = drift({"w": jnp.zeros(4)}, {"w": jnp.array([0.0, 3.0, 0.0, -4.0])})
    >>> row["norm"], row["largest"], row["largest_in"]
    (5.0, 4.0, 'w')
    """
    start, largest = dict(named_leaves(base)), {}
    by_layer: dict[str, float] = collections.defaultdict(float)  # squares, like the next two
    by_kind, origin = {}, {}
    for name, leaf in named_leaves(now):
        stacked, kind = name.startswith(LAYERS), name.removeprefix(LAYERS)
        squares, before, largest[name] = processes.fetch(_leaf(start[name], leaf, stacked))
        by_kind[kind], origin[kind] = float(squares.sum()), float(before.sum())
        for i, square in enumerate(np.atleast_1d(squares)):
            by_layer[f"layer {i}" if stacked else name.split("/")[0]] += float(square)
    if wrong := [name for name, square in by_kind.items() if not math.isfinite(square)]:
        raise ValueError(
            f"drift is not finite: NaN, infinite or too large weights in {', '.join(wrong)}; use other weights"
        )
    norm, dim, largest_in = math.sqrt(sum(by_kind.values())), dim or count(now), max(largest, key=largest.__getitem__)
    base_norm, rms = math.sqrt(sum(origin.values())), norm / math.sqrt(dim)
    return {
        "norm": norm,
        "predicted": predicted,
        "ratio": norm / predicted if predicted else None,
        "relative": norm / base_norm if base_norm else None,
        "rms": rms,
        "kappa": None if sigma is None else rms / sigma,
        "dim": dim,
        "largest": float(largest[largest_in]),
        "largest_in": largest_in,
        "by_layer": {name: math.sqrt(square) for name, square in by_layer.items()},
        "by_kind": {name: math.sqrt(square) for name, square in by_kind.items()},
        "by_kind_relative": {name: math.sqrt(by_kind[name] / b) if b else None for name, b in origin.items()},
    }


def warning(row: dict[str, Any]) -> str | None:
    """A warning if the measured drift is not the predicted one, else None.

    >>> warning({"norm": 1.01, "predicted": 1.0, "ratio": 1.01, "step": 5})
    >>> print(warning({"norm": 1.1, "predicted": 1.0, "ratio": 1.1, "step": 5}))
    step 5: drift is 1.1 but 1 was predicted, a ratio of 1.100 outside 1 ± 0.02: precision was lost
    """
    if row["ratio"] is None or abs(row["ratio"] - 1) <= TOLERANCE:
        return None
    return (
        f"step {row['step']}: drift is {row['norm']:.4g} but {row['predicted']:.4g} was predicted, a ratio of "
        f"{row['ratio']:.3f} outside 1 ± {TOLERANCE:g}: precision was lost"
    )


@functools.partial(jax.jit, static_argnums=2)
def _leaf(base: jax.Array, now: jax.Array, stacked: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of squares of θ − θ₀ and of θ₀ for each layer of a stacked leaf, and the largest |entry| of θ − θ₀."""
    start = base.astype(jnp.float32)
    moved, axes = now.astype(jnp.float32) - start, tuple(range(int(stacked), now.ndim))
    return jnp.sum(jnp.square(moved), axes), jnp.sum(jnp.square(start), axes), jnp.max(jnp.abs(moved))
