"""The members of a step: a seed and a sign for each, and nothing else."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt32

from es_jax.core import rng


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Members:
    """The members of one step; a pytree, so it goes through jit, vmap and scan.

    Attributes:
      seed: uint32 [N], the seed of each member's noise ε.
      sign: float32 [N], +1 or −1: the member is θ + sign·σ·ε. 0 is the unperturbed model; another number scales σ.
      paired: members 2i and 2i+1 share a seed with opposite signs, so an estimate makes their noise once.
    """

    seed: UInt32[Array, "*n"]
    sign: Float32[Array, "*n"]
    paired: bool = dataclasses.field(default=False, metadata={"static": True})

    def __len__(self) -> int:
        return self.seed.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray | Array) -> "Members":
        """One member (an int) or several (a slice or an index array)."""
        return Members(self.seed[index], self.sign[index])

    def __iter__(self) -> Iterator["Members"]:
        return (self[i] for i in range(len(self)))


def check_deal(population: int, prompts: int, each: int, *, antithetic: bool) -> None:
    """Raises ValueError, with the nearest numbers that work, if `each` of the prompts cannot be dealt evenly to that
    many members (`Population.deal`)."""

    def works(size: int, each: int) -> bool:
        members, rest = divmod(size * each, prompts)
        even = not antithetic or (size % 2 == members % 2 == 0 and members >= 4)
        return 1 <= each <= prompts and not rest and members >= 2 and even

    def nearest(value: int, known: Iterable[int]) -> str:
        return " or ".join(map(str, sorted(known, key=lambda other: (abs(other - value), other))[:3]))

    if not works(population, each):
        need = "an even number of at least 4 members" if antithetic else "a whole number of at least 2 members"
        why = f"every prompt must be seen by {need}, but {population} × {each} / {prompts} members would see it"
        cures = {
            "it": nearest(each, (k for k in range(1, prompts + 1) if works(population, k))),
            "es.population": nearest(population, (n for n in range(2, population + 8 * prompts + 1) if works(n, each))),
        }
        raise ValueError(
            f"es.prompts_per_member is {each} with es.population = {population} and {prompts} prompts a step: "
            + (why if each <= prompts else "a member cannot see a prompt twice")
            + f"; set {', or '.join(f'{field} to {values}' for field, values in cures.items() if values)}"
        )


@dataclasses.dataclass(frozen=True)
class Population:
    """N members a step, drawn from a run seed (arXiv 2509.24372, section 3).

    Args:
      size: N, at least 2; even when antithetic.
      seed: the run's seed, 0..2**32 − 1.
      antithetic: members come in pairs θ ± σε from N/2 seeds (mirrored sampling).
      streams: the version of the random streams; 1 gives the members of runs from before they had one.

    Raises:
      ValueError: N below 2, odd N with antithetic pairs, a seed out of range, unknown streams.

    >>> members = Population(4, seed=0, antithetic=True).members(0)
    >>> members.sign.tolist(), bool(members.seed[0] == members.seed[1])
    ([1.0, -1.0, 1.0, -1.0], True)
    """

    size: int
    _: dataclasses.KW_ONLY
    seed: int
    antithetic: bool = False
    streams: int = rng.STREAMS

    def __post_init__(self):
        if self.size < 2:
            raise ValueError(
                f"population size is {self.size}: rewards are compared within a population, so N must be at least 2"
            )
        if self.antithetic and self.size % 2:
            raise ValueError(
                f"population size is {self.size} with antithetic pairs: N must be even, so "
                f"set it to {self.size + 1}, or antithetic to False"
            )
        rng.check_seed(self.seed)
        rng.check_streams(self.streams)

    def deal(self, step: int, prompts: int, each: int) -> np.ndarray:
        """Which `each` of a step's prompts every member sees, int [N, each]: every prompt is seen by N·each/prompts.

        A function of seed and step. The members of an antithetic pair see the same prompts.

        Raises:
          ValueError: that quotient is not a whole number of at least 2, and of pairs even and at least 4.

        >>> Population(4, seed=0).deal(1, 2, 1).shape
        (4, 1)
        """
        check_deal(self.size, prompts, each, antithetic=self.antithetic)
        twice = 1 + self.antithetic
        order = rng.deal_order(self.seed, step, prompts)
        turns = np.arange(self.size // twice * each).reshape(-1, each) % prompts
        return np.repeat(order[turns], twice, axis=0)

    def members(self, step: int | Array) -> Members:
        """The members of a step (0, 1, 2, …): a pure function of (seed, step)."""
        count = self.size // 2 if self.antithetic else self.size
        seeds = rng.member_seeds(self.seed, step, count, streams=self.streams)
        if not self.antithetic:
            return Members(seeds, jnp.ones(self.size, jnp.float32))
        sign = jnp.tile(jnp.array([1.0, -1.0], jnp.float32), self.size // 2)
        return Members(jnp.repeat(seeds, 2), sign, paired=True)


def unperturbed_members(count: int) -> Members:
    """Members whose noise counts nothing: θ itself."""
    return Members(jnp.zeros(count, jnp.uint32), jnp.zeros(count, jnp.float32))
