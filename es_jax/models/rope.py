"""Rotary positions: plain and scaled frequencies, and the rotation of queries and keys.

Source: Su et al. 2021, arXiv 2104.09864; position interpolation (linear): Chen et al. 2023, arXiv 2306.15595.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from es_jax.models.config import TransformerConfig

Angles = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


def rope_frequencies(config: TransformerConfig, *, local: bool = False) -> np.ndarray:
    """Radians per position for each pair, float32 [head_dim/2]; `local`: for layers with a sliding window."""
    separate = local and config.local_rope_theta is not None
    theta = config.local_rope_theta if separate else config.rope_theta
    plain = 1 / np.float32(theta) ** (np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim)
    scaling = None if separate else config.rope_scaling
    if scaling is None:
        return plain
    low = plain / scaling.factor
    if scaling.kind == "linear":
        return low
    turns = scaling.original_positions * plain.astype(np.float64) / (2 * np.pi)  # within the original context
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(share, 0, 1).astype(np.float32)  # share of the plain frequency
    return (1 - share) * low + share * plain


def rope_angles(positions: Int[Array, "B T"], frequencies: np.ndarray) -> Angles:
    """Cosine and sine, float32 [B, T, head_dim/2], of position * frequency."""
    angle = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T H hd"], angles: Angles) -> Float[Array, "B T H hd"]:
    """Rotate the pairs (x[i], x[i + hd/2]) of every head by the angles of the token's position."""
    cos, sin = (a[:, :, None, :] for a in angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
