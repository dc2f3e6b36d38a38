"""How large the loops of a decode are: plain integers, for the program that runs and for the planner alike."""

import dataclasses

from es_jax.core.chunked_map import ceil_div
from es_jax.generate.decode_spec import DecodeSpec

CHUNK = 32  # decode steps between merges
SHORTEST = 128  # places that a chunk attends at least, where there are as many
FEWEST = 8  # slots that a chunk decodes at least, where there are as many
FILL, STEPS = "fill", "steps"  # what prefill and the decode steps are called in traces and in the compiled program


@dataclasses.dataclass(frozen=True)
class LoopSizes:
    """The sizes of one call of `generate.queue.decode`.

    Attributes:
      spec: of the decode.
      prompts: Q, how many there are, padding among them.
      width: P, tokens of a prompt after the prefix.
    """

    spec: DecodeSpec
    prompts: int
    width: int

    @property
    def slots(self) -> int:
        """B, prompts decoded at once."""
        return min(self.spec.slots, self.prompts)

    @property
    def steps(self) -> int:
        """K, decode steps of a chunk. The first token of a prompt comes from its prefill."""
        return min(CHUNK, self.spec.max_new_tokens - 1)

    @property
    def single(self) -> bool:
        """Whether one prefill and one chunk are all there is."""
        return self.prompts <= self.spec.slots and self.spec.max_new_tokens - 1 <= CHUNK

    @property
    def places(self) -> int:
        """Of a slot's keys and values, those of a chunk among them: all that a prompt can need, and a chunk more."""
        return self.width + self.steps if self.single else self.width + self.spec.max_new_tokens + 2 * self.steps

    @property
    def fill_rows(self) -> int:
        """Rows of a prefill: fewer than the slots, so that free slots need not wait for the last one."""
        return self.slots if self.single else ceil_div(self.slots, 4)

    @property
    def slot_sizes(self) -> list[int]:
        """How many slots a chunk may have: all, a half, a quarter."""
        return sorted({max(ceil_div(self.slots, part), min(FEWEST, self.slots)) for part in (1, 2, 4)})

    @property
    def place_sizes(self) -> list[int]:
        """Places of the slots' caches that a chunk may attend: SHORTEST, doubled up to all that a prompt can need."""
        most = self.width + self.spec.max_new_tokens - 1
        return [SHORTEST * 2**i for i in range(32) if SHORTEST * 2**i <= 0.75 * most] + [most]

    @property
    def widths(self) -> list[int]:
        """Widths of a prefill: that of the prompts, a half, a quarter."""
        return sorted({min(max(ceil_div(self.width, part), 32), self.width) for part in (1, 2, 4)})

    def turns(self) -> dict[str, float]:
        """How often the loops turn where no prompt stops: the outer one (""), and in each of its turns, on average,
        the inner ones."""
        chunks = ceil_div(self.prompts, self.slots) * ceil_div(self.spec.max_new_tokens - 1, max(self.steps, 1))
        return {"": chunks, FILL: ceil_div(self.prompts, self.fill_rows) / max(chunks, 1), STEPS: self.steps}
