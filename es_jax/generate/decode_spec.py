"""What a compiled decode depends on besides the shapes of its arguments, and how large its loops are."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from es_jax.core.chunked_map import ceil_div
from es_jax.generate.sampling import Greedy, Sampler
from es_jax.models.config import TransformerConfig
from es_jax.models.decode_attention import supports, whole_blocks

CHUNK = 32  # decode steps between merges
LANE_CHUNK = 256  # the same where all prompts of several lanes are decoded at once: without merges nothing is cut out
SHORTEST = 128  # places that a chunk attends at least, where there are as many
FEWEST = 8  # slots that a chunk decodes at least, where there are as many
BLOCK, BLOCKS = 16, 256  # tokens that a prefill of several lanes takes at a time: of a row at least, and of all
FILL, PART, STEPS = "fill", "part", "steps"  # prefill, its blocks and decode steps in traces and compiled programs


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The fields of `es_jax.Engine`, which says what they mean and what it raises, without its limit on prompts."""

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
        """Whether a step writes to the slots' own caches, and attends them by a kernel."""
        if self.in_place is None:
            return jax.default_backend() == "gpu" and supports(self.config)
        return self.in_place

    @property
    def unrolled(self) -> bool:
        """Whether the programs want the layers apart."""
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
                f"in_place is True: it needs layers that are unrolled (unroll is {self.unroll}), and heads of 16, 32, "
                f"64, 128 or 256 numbers (they have {self.config.head_dim}); leave it out"
            )


def block_length(rows: int, width: int, lanes: int) -> int:
    """Tokens of a row that one pass of a prefill takes: all, but of several lanes, each of which holds what a token
    needs, BLOCKS in all."""
    return width if lanes == 1 else min(width, max(BLOCK, BLOCKS // rows // lanes))


class LoopSizes(NamedTuple):
    """The sizes of one call of `generate.queue.decode_queue`, for the program that runs and for the planner alike."""

    prompts: int  # Q, how many there are, padding among them
    width: int  # P, tokens of a prompt after the prefix
    slots: int  # B, prompts decoded at once
    steps: int  # K, decode steps of a chunk; the first token of a prompt comes from its prefill
    single: bool  # whether one prefill and one chunk are all there is
    places: int  # of a slot's keys and values, a chunk's among them: all that a prompt can need, and a chunk more
    fill_rows: int  # rows of a prefill: a quarter of the slots (all, if single): free ones do not wait for the last
    slot_sizes: list[int]  # how many slots a chunk may have: all, a half, and of unrolled layers a quarter
    place_sizes: list[int]  # that a chunk may attend: SHORTEST, then twice (in a scan, four times) as many, …, all
    widths: list[int]  # of a prefill: that of the prompts, and of one lane a half, and on CPUs a quarter
    in_place: bool  # whether steps write to the slots' own caches; a chunk then has none, and one size
    turns: dict[str, float]  # of the outer loop (""), and of the inner ones in each of its turns, where no prompt stops

    @property
    def own_places(self) -> int:
        """Of the slots' own caches, before the first prefill."""
        return self.places if self.in_place else 0 if self.single else self.places - self.steps

    @classmethod
    def of(cls, spec: DecodeSpec, prompts: int, width: int, *, lanes: int = 1) -> "LoopSizes":
        """Those of so many prompts of that width, on each of so many lanes of a vmap."""
        slots, later, chunk = min(spec.slots, prompts), spec.max_new_tokens - 1, CHUNK
        in_place = spec.writes_in_place and lanes == 1
        if lanes > 1 and prompts <= spec.slots and later <= LANE_CHUNK:
            chunk = LANE_CHUNK
        steps, single = min(chunk, later), prompts <= spec.slots and later <= chunk and not in_place
        fill_rows, longest = slots if single else ceil_div(slots, 4), width + later
        chunks = ceil_div(prompts, slots) * ceil_div(later, max(steps, 1))
        whole = width + spec.max_new_tokens + steps  # of the slots' caches: a chunk of any slot has room
        if in_place:
            whole = whole_blocks(width + spec.max_new_tokens)
        fewer = not spec.unrolled  # sizes of a chunk, of which a TPU would take minutes to compile a dozen
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
