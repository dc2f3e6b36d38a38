"""Prompts as arrays: their common beginning once, and the rest of each row in one width."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from es_jax.core.chunked_map import ceil_div

WIDTH_STEP = 32  # prompts are padded to a multiple of this many tokens, so that few widths are compiled
PREFIX_STEP = 16  # a shared prefix is a multiple of this many tokens long, for the same reason

TokenLists = Sequence[Sequence[int]]  # token ids, a list for each prompt


def padded_width(longest: int, limit: int) -> int:
    """The width for prompts of up to `longest` tokens, at most `limit`."""
    return min(ceil_div(longest, WIDTH_STEP) * WIDTH_STEP, limit)


class Prompts(NamedTuple):
    """Q prompts as an engine takes them: arrays of NumPy or JAX."""

    tokens: Any  # int32 [Q, P], each row's tokens after the prefix at its left end, 0 to their right
    positions: Any  # int32 [Q, P], where they stand in their prompt: from C on, -1 to their right; -1 alone: padding
    prefix: Any  # int32 [C], the tokens that every prompt begins with; C may be 0


@dataclasses.dataclass(frozen=True)
class Packing:
    """The shapes that one set of prompts, and all its subsets, are packed into, so that they share their programs."""

    prefix: tuple[int, ...]  # the tokens that all the prompts begin with, a multiple of PREFIX_STEP of them
    width: int  # P, places for the tokens of a prompt after the prefix

    @classmethod
    def of(cls, prompts: TokenLists, *, max_prompt_tokens: int) -> "Packing":
        """The packing of these prompts, each of 1..max_prompt_tokens tokens; at least one token stays after the prefix.

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
        """Tokens that prefill computes of these prompts, each `times` over: the prefix once for each of the models."""
        return models * len(self.prefix) + times * sum(len(prompt) - len(self.prefix) for prompt in prompts)

    def pack(self, prompts: TokenLists, *, rows: int) -> Prompts:
        """Some of the prompts, and padding up to `rows` rows. Raises ValueError for a prompt that is not one of them.

        >>> Packing((7,), 2).pack([[7, 8]], rows=1).tokens
        array([[8, 0]], dtype=int32)
        """
        shared = len(self.prefix)
        tokens, positions = np.zeros((rows, self.width), np.int32), np.full((rows, self.width), -1, np.int32)
        for row, prompt in enumerate(prompts):
            if tuple(prompt[:shared]) != self.prefix or not shared < len(prompt) <= shared + self.width:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens and does not fit a packing of {shared} shared tokens and "
                    f"up to {self.width} others: make the packing of all prompts, this one among them"
                )
            tokens[row, : len(prompt) - shared] = prompt[shared:]
            positions[row, : len(prompt) - shared] = np.arange(shared, len(prompt))
        return Prompts(tokens, positions, np.array(self.prefix, np.int32))
