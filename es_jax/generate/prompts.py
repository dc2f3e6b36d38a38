"""Prompts as arrays: their shared prefix once, and the rest of each row padded to one width."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from es_jax.core.chunked_map import ceil_div

WIDTH_STEP = 32  # prompts are padded to a multiple of this, so that few widths are compiled
PREFIX_STEP = 16  # a shared prefix is a multiple of this long, for the same reason

TokenLists = Sequence[Sequence[int]]  # a list of token ids for each prompt


def padded_width(longest: int, limit: int) -> int:
    """The width for prompts of up to `longest` tokens, at most `limit`."""
    return min(ceil_div(longest, WIDTH_STEP) * WIDTH_STEP, limit)


class Prompts(NamedTuple):
    """Q prompts as arrays of NumPy or JAX, in the form that an engine takes."""

    tokens: Any  # int32 [Q, P], each row's tokens after the prefix, followed by 0s
    positions: Any  # int32 [Q, P], their positions in the prompt, from C on, followed by -1s; a row of -1 is padding
    prefix: Any  # int32 [C], the tokens with which every prompt begins; C may be 0


@dataclasses.dataclass(frozen=True)
class Packing:
    """The shapes into which a set of prompts and all its subsets are packed, so that they share programs."""

    prefix: tuple[int, ...]  # the tokens with which all prompts begin; their number is a multiple of PREFIX_STEP
    width: int  # P, room for the tokens of a prompt after the prefix

    @classmethod
    def of(cls, prompts: TokenLists, *, max_prompt_tokens: int) -> "Packing":
        """The packing for these prompts of 1..max_prompt_tokens tokens each; at least one token comes after the prefix.

        >>> Packing.of([[7] * 20, [7] * 18 + [1]], max_prompt_tokens=40)
        Packing(prefix=(7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7), width=24)
        """
        longest, shortest = max(map(len, prompts)), min(map(len, prompts))
        alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
        common = min(sum(1 for _ in alike), shortest - 1)
        shared = common - common % PREFIX_STEP
        width = padded_width(longest - shared, max(max_prompt_tokens, longest) - shared)
        return cls(prefix=tuple(prompts[0][:shared]), width=width)

    def prefilled(self, prompts: TokenLists, *, times: int, models: int) -> int:
        """Tokens that prefill computes for these prompts, each `times` times, with the prefix once for each model."""
        return models * len(self.prefix) + times * sum(len(prompt) - len(self.prefix) for prompt in prompts)

    def pack(self, prompts: TokenLists, *, rows: int) -> Prompts:
        """Pack some of the prompts, padded to `rows` rows. Raises ValueError for a prompt that does not fit the
        packing.

        >>> Packing((7,), 2).pack([[7, 8]], rows=1).tokens
        array([[8, 0]], dtype=int32)
        """
        shared = len(self.prefix)
        tokens, positions = np.zeros((rows, self.width), np.int32), np.full((rows, self.width), -1, np.int32)
        for row, prompt in enumerate(prompts):
            if tuple(prompt[:shared]) != self.prefix or not shared < len(prompt) <= shared + self.width:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens and does not fit a packing with {shared} shared tokens "
                    f"and up to {self.width} others: make the packing from all prompts, including this one"
                )
            tokens[row, : len(prompt) - shared] = prompt[shared:]
            positions[row, : len(prompt) - shared] = np.arange(shared, len(prompt))
        return Prompts(tokens, positions, np.array(self.prefix, np.int32))
