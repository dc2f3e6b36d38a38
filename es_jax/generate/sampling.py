"""How the next token is chosen from the logits of one row."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray


@runtime_checkable
class Sampler(Protocol):
    """Picks a token id from the logits of one row.

    It is a pure function and hashable. Only `Greedy` works without a key.
    """

    def __call__(self, logits: Float[Array, " V"], key: PRNGKeyArray | None) -> Int32[Array, ""]: ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the likeliest token, and the lowest id among equals. This is how ES scores its members.

    Examples:
      >>> int(Greedy()(jnp.array([0.0, 2.0, 2.0]), None))
      1
    """

    def __call__(self, logits, key):
        """Picks the likeliest token.

        Args:
          logits: float32 [V].
          key: not used; None will do.

        Returns:
          int32 scalar in 0..V − 1, a token id.
        """
        return jax.lax.platform_dependent(logits, cpu=_argmax_in_blocks, default=_argmax)


def _argmax(logits: Array) -> Array:
    """For accelerators: a TPU's compiler fuses it into the product that makes the logits, which are never written to
    memory."""
    return jnp.argmax(logits).astype(jnp.int32)


def _argmax_in_blocks(logits: Array) -> Array:
    """For CPUs, where a maximum vectorises and an argmax over all of V does not: find the maximum's block, then its
    place in it. The blocks are few and long: their number is the largest divisor of V in 1..4√V."""
    size = logits.shape[-1]
    count = next(n for n in range(max(int(4 * size**0.5), 1), 0, -1) if size % n == 0)
    blocks = logits.reshape(count, -1)
    block = jnp.argmax(jnp.max(blocks, axis=1))
    place = jnp.argmax(jax.lax.dynamic_index_in_dim(blocks, block, keepdims=False))
    return (block * blocks.shape[1] + place).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Draws a token from softmax(logits / t).

    Args:
      t: the temperature, above 0. 1 draws from the model's own distribution, and a lower one prefers likely tokens.

    Raises:
      ValueError: `t` is not above 0.

    Examples:
      >>> int(Temperature(0.7)(jnp.array([0.0, 99.0]), jax.random.key(0)))
      1
    """

    t: float

    def __post_init__(self):
        if not self.t > 0:
            raise ValueError(f"temperature is {self.t}: it must be above 0; use Greedy() for its limit")

    def __call__(self, logits, key):
        """Draws a token.

        Args:
          logits: float32 [V].
          key: the random key to draw with.

        Returns:
          int32 scalar in 0..V − 1, a token id.
        """
        return jax.random.categorical(key, logits / self.t).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Draws a token from softmax(logits / t), restricted to the k likeliest tokens and those tied with the k-th.

    Args:
      k: how many tokens can be drawn, at least 1. More than V means all.
      t: the temperature, above 0.

    Raises:
      ValueError: `k` is below 1, or `t` is not above 0.

    Examples:
      >>> int(TopK(1)(jnp.array([0.0, 1.0, 2.0]), jax.random.key(0)))
      2
    """

    k: int
    t: float = 1.0

    def __post_init__(self):
        Temperature(self.t)  # checks it
        if self.k < 1:
            raise ValueError(f"k is {self.k}: it must be at least 1")

    def __call__(self, logits, key):
        """Draws a token.

        Args:
          logits: float32 [V].
          key: the random key to draw with.

        Returns:
          int32 scalar in 0..V − 1, a token id.
        """
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][-1]
        return jax.random.categorical(key, jnp.where(logits >= kth, logits / self.t, -jnp.inf)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class TopP:
    """Draws a token from softmax(logits / t), restricted to the fewest likeliest tokens with probability at least p.

    Args:
      p: the probability that the set has to reach, above 0 and at most 1.
      t: the temperature, above 0.

    Raises:
      ValueError: `p` is not above 0 and at most 1, or `t` is not above 0.

    Examples:
      >>> int(TopP(0.5)(jnp.array([0.0, 0.0, 9.0]), jax.random.key(0)))
      2
    """

    p: float
    t: float = 1.0

    def __post_init__(self):
        Temperature(self.t)
        if not 0 < self.p <= 1:
            raise ValueError(f"p is {self.p}: it must be above 0 and at most 1")

    def __call__(self, logits, key):
        """Draws a token.

        Args:
          logits: float32 [V].
          key: the random key to draw with.

        Returns:
          int32 scalar in 0..V − 1, a token id.
        """
        ordered = jnp.sort(logits / self.t, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
        least = jnp.min(jnp.where(before < self.p, ordered, jnp.inf))
        likeliest = jnp.where(logits / self.t >= least, logits / self.t, -jnp.inf)
        return jax.random.categorical(key, likeliest).astype(jnp.int32)


def sampler_of(temperature: float, top_p: float = 1.0) -> Sampler:
    """Makes the sampler of two numbers as users give them: `Greedy` at temperature 0, whatever `top_p` is.

    Args:
      temperature: at least 0.
      top_p: above 0 and at most 1.

    Returns:
      The sampler.

    Raises:
      ValueError: a number is out of range.

    Examples:
      >>> sampler_of(0.0), sampler_of(0.7), sampler_of(0.7, 0.95)
      (Greedy(), Temperature(t=0.7), TopP(p=0.95, t=0.7))
    """
    if temperature == 0:
        return Greedy()
    return Temperature(temperature) if top_p == 1 else TopP(top_p, temperature)
