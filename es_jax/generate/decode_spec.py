"""What a compiled decode depends on, besides the shapes of its arguments: one frozen record that validates itself."""

import dataclasses

import numpy as np

from es_jax.generate.sampling import Greedy, Sampler
from es_jax.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The fields of `es_jax.Engine`, which says what they mean, without its limit on prompts.

    Raises:
      ValueError: a size that is not a whole number above 0, or a stop id outside the vocabulary.
    """

    config: TransformerConfig
    _: dataclasses.KW_ONLY
    slots: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    sampler: Sampler = Greedy()
    logprobs: bool = False
    unroll: bool | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{field.name} is {value}: it must be a whole number, at least 1")
        for token in self.stop_token_ids:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"stop token {token} is outside the vocabulary of {self.config.vocab_size}")
