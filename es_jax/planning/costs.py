"""The least that an iteration must compute and move, counted from shapes, and how long that takes at published peaks.

A run takes longer than this bound. It assumes that each completion has its full length, that each chip reaches its
peak, and that arithmetic, memory and links work at the same time. It leaves out the noise, which is vector work without
a published peak.
"""

import math
from typing import NamedTuple

from es_jax.core.chips import Chip
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import matrix_weights, param_shapes


class Work(NamedTuple):
    """The work of one device: floating-point operations, bytes read and written in its memory, bytes sent to others."""

    flops: float = 0.0
    memory: float = 0.0
    sent: float = 0.0

    def seconds(self, chip: Chip) -> float:
        """Seconds at the chip's peaks, with all three in parallel.

        >>> from es_jax.core.chips import chip
        >>> Work(flops=197e12, memory=2 * 819e9).seconds(chip("v5e"))
        2.0
        """
        return max(self.flops / chip.flops, self.memory / chip.bandwidth, self.sent / chip.interconnect)


def cache_bytes(config: TransformerConfig, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of that many tokens in all layers."""
    return 2 * config.layers * tokens * config.kv_heads * config.head_dim * itemsize


def _attended(config: TransformerConfig, first: int, last: int) -> int:
    """Attended tokens, summed over the layers and over queries at the positions `first` to `last` − 1."""
    windows = [config.sliding_window if local else None for local, _ in config.layer_kinds]
    return sum(min(position + 1, window or last) for window in windows for position in range(first, last))


def pair_numbers(config: TransformerConfig) -> tuple[int, int]:
    """Numbers in a member's thin matrices of rank 1 that multiply every token's activations: in the layers, in the
    head."""
    kernels = (shape for name, shape in param_shapes(config).items() if name.startswith("layers/") and len(shape) > 2)
    return sum(math.prod(shape[:-2]) * sum(shape[-2:]) for shape in kernels), config.width + config.vocab_size


def forward_flops(config: TransformerConfig, rows: int, tokens: int, *, logits: int, rank: int = 0) -> float:
    """Operations for rows of so many tokens, with the logits of some of them: two per weight and token, two per number
    in the member's pairs of that rank, four per head dimension and attended token."""
    both = zip(matrix_weights(config), pair_numbers(config), strict=True)
    layers, head = (weights + rank * pairs for weights, pairs in both)
    attention = 4 * config.heads * config.head_dim * _attended(config, 0, tokens)
    return rows * (2.0 * layers * tokens + 2.0 * head * logits + attention)


def decode_memory(
    config: TransformerConfig, prompts: int, prompt: int, new: int, *, steps: int, copy: float, itemsize: int
) -> float:
    """Bytes that a member's decoding reads: `copy` bytes of weights at each step, and the attended keys and values."""
    attended = _attended(config, prompt, prompt + new - 1)
    return steps * copy + prompts * attended * 2.0 * config.kv_heads * config.head_dim * itemsize
