"""Batched generation: one prefill, then one jitted loop of decode steps that ends when every row has stopped."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key, PRNGKeyArray

from es_jax.core import rng
from es_jax.generate.sampling import Greedy, Sampler
from es_jax.models.cache import KVCache
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import Transformer, unstack_layers

BUCKET = 32  # prompts are padded to a multiple of this many tokens, so that few lengths are compiled


class Generation(NamedTuple):
    """What was generated for B prompts.

    Attributes:
      tokens: int32 [B, L], the completion, its stop token included; 0 behind it.
      length: int32 [B], how many tokens of the row count, 0..L. Below L, or with a stop token last, the row stopped
        by itself; otherwise it was cut at L = max_new.
      logprob: float32 [B, L], each token's log-probability under the model at temperature 1; None if not asked for.
    """

    tokens: Int32[Array, "B L"]
    length: Int32[Array, "B"]
    logprob: Float32[Array, "B L"] | None


class _State(NamedTuple):
    cache: KVCache | None
    token: Array  # [B] chosen last, not yet fed
    position: Array  # [B] where that token stands; -1 once the row is done
    step: Array
    out: Generation


@dataclasses.dataclass(frozen=True)
class Engine:
    """Generates for any number of prompts, `slots` at a time.

    A row's tokens depend on its own prompt (and, when sampled, on its index in the list) alone, never on the rows
    beside it. Programs are compiled once per prompt bucket.

    Args:
      config: of the model.
      slots: prompts decoded at once.
      max_prompt: longest prompt allowed, in tokens.
      max_new: tokens after which a completion is cut.
      stop: token ids that end a row.
      sampler: how a token is chosen.
      logprobs: also return log-probabilities.
      unroll: run the layers one after another rather than in a scan; by default on CPU, where it decodes faster.

    Raises:
      ValueError: a size below 1, or a stop id outside the vocabulary.

    >>> import jax
    >>> config = TransformerConfig(family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1,
    ...                            head_dim=4, mlp_dim=8)
    >>> engine = Engine(config, slots=2, max_prompt=8, max_new=3, stop=(0,))
    >>> engine.generate(Transformer(config).init(jax.random.key(0)), [[1, 2], [3], [4, 5, 6]]).tokens.shape
    (3, 3)
    """

    config: TransformerConfig
    _: dataclasses.KW_ONLY
    slots: int
    max_prompt: int
    max_new: int
    stop: tuple[int, ...]
    sampler: Sampler = Greedy()
    logprobs: bool = False
    unroll: bool | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", tuple(int(i) for i in self.stop))
        for field in ("slots", "max_prompt", "max_new"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: it must be at least 1")
        for token in self.stop:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"stop token {token} is outside the vocabulary of {self.config.vocab_size}")

    def layout(self, params: Any) -> Any:
        """The tree as the programs want it: layers apart where they are unrolled. Use inside jit."""
        unroll = jax.default_backend() == "cpu" if self.unroll is None else self.unroll
        return unstack_layers(params) if unroll else params

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Left-padded (tokens, positions), each int32 [slots, P], with one P for all; see `pad_prompts`.

        Raises:
          ValueError: no prompts, an empty one, one longer than `max_prompt`, or a token outside the vocabulary.
        """
        if not len(prompts):
            raise ValueError("there are no prompts: give at least one")
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= self.max_prompt:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens: it must have 1 to decode.max_prompt = {self.max_prompt}; "
                    "raise decode.max_prompt or leave the prompt out"
                )
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise ValueError(
                    f"prompt {i} has token ids {min(prompt)}..{max(prompt)}: the model's vocabulary is "
                    f"0..{self.config.vocab_size - 1}; is this the model's own tokenizer?"
                )
        longest = max(map(len, prompts))
        width = min(-(-longest // BUCKET) * BUCKET, max(self.max_prompt, longest))
        return [
            pad_prompts(prompts[i : i + self.slots], rows=self.slots, width=width)
            for i in range(0, len(prompts), self.slots)
        ]

    def decode(self, params: Any, tokens: Array, positions: Array, keys: Key[Array, "B"] | None = None) -> Generation:
        """Prefill and decode one batch; pure, for use inside jit, vmap and shard_map.

        Args:
          params: as `layout` gives them; their dtype is the compute dtype.
          tokens, positions: int32 [B, P] from `batches`. A row of padding alone is done from the start, and a batch
            of nothing else costs nothing.
          keys: [B], one for each row, where the sampler draws.
        """
        keys = jax.vmap(lambda i: rng.key(i))(jnp.zeros(len(tokens), jnp.uint32)) if keys is None else keys
        empty = self._empty(len(tokens))
        return jax.lax.cond(
            jnp.any(positions >= 0),
            lambda: self._decode(params, tokens, positions, keys, empty),
            lambda: empty,
        )

    def generate(self, params: Any, prompts: Sequence[Sequence[int]], *, key: PRNGKeyArray | None = None) -> Generation:
        """Completions of a list of token-id prompts, in their order, as host arrays.

        Args:
          params: the model's parameters; they are used in the dtype they come in.
          prompts: lists of token ids, 1..max_prompt each.
          key: needed when the sampler draws; row i uses `fold_in(key, i)`.
        """
        if key is None and not isinstance(self.sampler, Greedy):
            raise ValueError(f"sampler is {self.sampler}: pass key= to draw from")
        params = _layout(self, params)
        done = []
        for i, (tokens, positions) in enumerate(self.batches(prompts)):
            keys = None
            if key is not None:
                rows = jnp.arange(i * self.slots, (i + 1) * self.slots)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
            done.append(_decode_batch(self, params, tokens, positions, keys))
        parts = (None if part[0] is None else np.concatenate(part)[: len(prompts)] for part in zip(*done, strict=True))
        return Generation(*parts)  # type: ignore[arg-type]

    def _empty(self, rows: int) -> Generation:
        logprob = jnp.zeros((rows, self.max_new), jnp.float32) if self.logprobs else None
        return Generation(jnp.zeros((rows, self.max_new), jnp.int32), jnp.zeros(rows, jnp.int32), logprob)

    def _decode(self, params: Any, tokens: Array, positions: Array, keys: Any, out: Generation) -> Generation:
        model = Transformer(self.config)
        rows, width = tokens.shape
        stacked = not isinstance(params["layers"], tuple)
        dtype = params["embed"]["embedding"].dtype
        cache = KVCache.empty(self.config, rows, length=width, dtype=dtype, stacked=stacked)
        last = jnp.full((rows,), width - 1, jnp.int32)
        logits, filled = model.apply(params, tokens, positions=positions, cache=cache, logits_at=last)
        assert filled is not None
        position = jnp.where(positions[:, -1] >= 0, positions[:, -1] + 1, -1)
        state = self._choose(logits, _State(filled.grow(self.max_new - 1), last, position, jnp.int32(0), out), keys)

        def more(state: _State) -> Array:
            return (state.step < self.max_new) & jnp.any(state.position >= 0)

        def step(state: _State) -> _State:
            logits, cache = model.apply(
                params, state.token[:, None], positions=state.position[:, None], cache=state.cache
            )
            position = jnp.where(state.position >= 0, state.position + 1, -1)
            return self._choose(logits[:, 0], state._replace(cache=cache, position=position), keys)

        return jax.lax.while_loop(more, step, state).out

    def _choose(self, logits: Array, state: _State, keys: Any) -> _State:
        """Pick each live row's next token and write it down; a row that stops gets position -1."""
        live = state.position >= 0
        drawn = jax.vmap(self.sampler)(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, state.step))
        token = jnp.where(live, drawn, 0)
        out = state.out
        tokens = jax.lax.dynamic_update_slice(out.tokens, token[:, None], (0, state.step))
        logprob = out.logprob
        if logprob is not None:
            chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
            logprob = jax.lax.dynamic_update_slice(logprob, jnp.where(live, chosen, 0.0)[:, None], (0, state.step))
        stopped = jnp.any(token[:, None] == jnp.array(self.stop, jnp.int32)[None, :], axis=1)
        return state._replace(
            token=token,
            position=jnp.where(live & ~stopped, state.position, -1),
            step=state.step + 1,
            out=Generation(tokens, out.length + live.astype(jnp.int32), logprob),
        )


def pad_prompts(prompts: Sequence[Sequence[int]], *, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions), int32 [rows, width]: prompts at the right end, position -1 before them and in spare rows.

    >>> pad_prompts([[7, 8]], rows=1, width=3)
    (array([[0, 7, 8]], dtype=int32), array([[-1,  0,  1]], dtype=int32))
    """
    tokens, positions = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


@functools.partial(jax.jit, static_argnums=0)
def _layout(engine: Engine, params: Any) -> Any:
    return engine.layout(params)


@functools.partial(jax.jit, static_argnums=0)
def _decode_batch(engine: Engine, params: Any, tokens: Array, positions: Array, keys: Any) -> Generation:
    return engine.decode(params, tokens, positions, keys)
