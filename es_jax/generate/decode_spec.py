"""What a compiled decode depends on besides the shapes of its arguments, and the sizes of its loops."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from es_jax.core.chunked_map import ceil_div
from es_jax.generate.sampling import Greedy, Sampler
from es_jax.models.config import TransformerConfig
from es_jax.models.decode_attention import supports, whole_blocks

CHUNK = 32  # decode steps between two merges into the slots' caches
LANE_CHUNK = 256  # the same if several lanes decode all prompts at once
SHORTEST = 128  # least places that a chunk attends, if there are as many
FEWEST = 8  # least slots that a chunk decodes, if there are as many
BLOCK, BLOCKS = 16, 256  # tokens at a time in a prefill of several lanes: least for a row, and for all
FILL, PART, STEPS = "fill", "part", "steps"  # scopes in traces and programs: prefill, its blocks, decode steps


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The fields of `es_jax.Engine`, except its limit on prompts; they are documented there, with what it raises."""

    config: TransformerConfig
    _: dataclasses.KW_ONLY
    slots: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    sampler: Sampler = Greedy()
    logprobs: bool = False
    unroll: bool | None = None
    in_place: bool | None = None

    @property
    def writes_in_place(self) -> bool:
        """Whether a step writes to the slots' own caches and attends them with a kernel."""
        if self.in_place is None:
            return jax.default_backend() == "gpu" and supports(self.config)
        return self.in_place

    @property
    def unrolled(self) -> bool:
        """Whether the programs need the layers one by one."""
        if self.unroll is None:
            return jax.default_backend() == "cpu" or self.writes_in_place
        return self.unroll

    def __post_init__(self):
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{field.name} is {value}: it must be a whole number, at least 1")
        for token in self.stop_token_ids:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"stop token {token} is outside the vocabulary of {self.config.vocab_size}")
        if self.in_place and not (self.unroll is not False and supports(self.config)):
            raise ValueError(
                f"in_place is True: it needs unrolled layers (unroll is {self.unroll}) and heads with 16, 32, 64, 128 "
                f"or 256 numbers (they have {self.config.head_dim}); leave it out"
            )


def block_length(rows: int, width: int, lanes: int) -> int:
    """Tokens of a row per pass of a prefill: all for one lane. Several lanes together take BLOCKS tokens, since each
    holds memory for every token."""
    return width if lanes == 1 else min(width, max(BLOCK, BLOCKS // rows // lanes))


class LoopSizes(NamedTuple):
    """The sizes of one call of `generate.queue.decode_queue`, both for the program that runs and for the planner."""

    prompts: int  # Q, the number of prompts, including padding
    width: int  # P, tokens of a prompt after the shared prefix
    slots: int  # B, prompts decoded at once
    steps: int  # K, decode steps in a chunk; a prompt's first token comes from its prefill
    single: bool  # whether there is only one prefill and one chunk
    places: int  # places of a slot's cache: all that a prompt can need, and one chunk
    fill_rows: int  # rows of a prefill: a quarter of the slots (all, if single), so free slots wait less
    slot_sizes: list[int]  # slots that a chunk may have: all, a half, and with unrolled layers a quarter
    place_sizes: list[int]  # places a chunk may attend: SHORTEST, then twice (in a scan, four times) as many, …, all
    widths: list[int]  # widths of a prefill: that of the prompts; with one lane also a half, on CPUs also a quarter
    in_place: bool  # whether steps write to the slots' own caches; a chunk then has no cache and one size
    turns: dict[str, float]  # iterations of the outer loop (""), and of the inner loops in each, if no prompt stops

    @property
    def own_places(self) -> int:
        """The slots' own caches before the first prefill."""
        return self.places if self.in_place else 0 if self.single else self.places - self.steps

    @classmethod
    def of(cls, spec: DecodeSpec, prompts: int, width: int, *, lanes: int = 1) -> "LoopSizes":
        """The sizes for so many prompts of that width, on each of so many lanes of a vmap."""
        slots, later, chunk = min(spec.slots, prompts), spec.max_new_tokens - 1, CHUNK
        in_place = spec.writes_in_place and lanes == 1
        if lanes > 1 and prompts <= spec.slots and later <= LANE_CHUNK:
            chunk = LANE_CHUNK
        steps, single = min(chunk, later), prompts <= spec.slots and later <= chunk and not in_place
        fill_rows, longest = slots if single else ceil_div(slots, 4), width + later
        chunks = ceil_div(prompts, slots) * ceil_div(later, max(steps, 1))
        whole = width + spec.max_new_tokens + steps  # places of the slots' caches: any slot has room for a chunk
        if in_place:
            whole = whole_blocks(width + spec.max_new_tokens)
        fewer = not spec.unrolled  # sizes of a chunk; a TPU would take minutes to compile a dozen of them
        smaller = (SHORTEST << i for i in range(0, longest.bit_length(), 2 if fewer else 1))
        slot_parts = (1, 2) if fewer else (1, 2, 4)
        near, parts = 20 * whole <= 21 * longest, (1, 2) if in_place or fewer else (1, 2, 4)
        return cls(
            prompts,
            width,
            slots,
            steps,
            single,
            places=width + steps if single else whole if in_place else whole + steps,
            fill_rows=fill_rows,
            slot_sizes=sorted({max(ceil_div(slots, part), min(FEWEST, slots)) for part in slot_parts}),
            place_sizes=[*(places for places in smaller if places <= 0.75 * longest), whole if near else longest],
            in_place=in_place,
            widths=sorted({min(max(ceil_div(width, part), 32), width) for part in (parts if lanes == 1 else (1,))}),
            turns={
                "": chunks,
                FILL: ceil_div(prompts, fill_rows) / max(chunks, 1),
                PART: ceil_div(width, block_length(fill_rows, width, lanes)),
                STEPS: steps,
            },
        )
