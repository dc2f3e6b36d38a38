"""Who is evaluated in a step: a seed and a sign for every member, and nothing else."""

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
    """The members of one step. It is a pytree, so it goes through jit, vmap and scan.

    `len(members)` is N. `members[i]` is one member, and a slice or an index array selects several.

    Attributes:
      seed: uint32 [N], the seed of each member's noise ε.
      sign: float32 [N], +1 or −1: the member is θ + sign·σ·ε. 0 is the unperturbed model; another number scales σ.
      paired: True where members 2i and 2i+1 share a seed and have opposite signs. An estimate then draws their noise
        once.

    Examples:
      >>> members = Population(4, seed=0).members(0)
      >>> len(members), members[:2].seed.shape, float(members[0].sign)
      (4, (2,), 1.0)
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
    """N members a step, all drawn from the run's seed.

    Source: arXiv 2509.24372, section 3.

    Args:
      size: N, at least 2; even with antithetic pairs.
      seed: the run's seed, 0..2³² − 1.
      antithetic: True makes pairs θ ± σε from N/2 seeds (mirrored sampling).
      streams: the version of the random streams. 1 gives the members of runs older than the versions.

    Raises:
      ValueError: N is below 2, or odd with antithetic pairs; the seed is out of range; or the version is unknown.

    Examples:
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
        """Chooses the prompts that every member sees: `each` of a step's prompts.

        Each prompt is seen by N·each/prompts members. The choice is a function of seed and step. The two members of an
        antithetic pair see the same prompts.

        Args:
          step: 0, 1, 2, …
          prompts: how many prompts the step has.
          each: how many of them a member sees, 1..prompts.

        Returns:
          int [N, each], indices of prompts.

        Raises:
          ValueError: N·each/prompts is not a whole number of at least 2; with antithetic pairs, of an even number of at
            least 4. The message names the nearest numbers that work.

        Examples:
          >>> Population(4, seed=0).deal(1, 2, 1).shape
          (4, 1)
        """
        check_deal(self.size, prompts, each, antithetic=self.antithetic)
        twice = 1 + self.antithetic
        order = rng.deal_order(self.seed, step, prompts)
        turns = np.arange(self.size // twice * each).reshape(-1, each) % prompts
        return np.repeat(order[turns], twice, axis=0)

    def members(self, step: int | Array) -> Members:
        """Draws the members of a step, a pure function of seed and step.

        Args:
          step: 0, 1, 2, …; it may be traced.

        Returns:
          The N members.
        """
        count = self.size // 2 if self.antithetic else self.size
        seeds = rng.member_seeds(self.seed, step, count, streams=self.streams)
        if not self.antithetic:
            return Members(seeds, jnp.ones(self.size, jnp.float32))
        sign = jnp.tile(jnp.array([1.0, -1.0], jnp.float32), self.size // 2)
        return Members(jnp.repeat(seeds, 2), sign, paired=True)


def unperturbed_members(count: int) -> Members:
    """Members whose noise counts nothing: θ itself."""
    return Members(jnp.zeros(count, jnp.uint32), jnp.zeros(count, jnp.float32))
