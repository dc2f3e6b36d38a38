"""Batched generation: a queue of prompts through a fixed number of slots."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Key, PRNGKeyArray

from es_jax.core import processes
from es_jax.core.chunked_map import ceil_div
from es_jax.generate.decode_spec import DecodeSpec, LoopSizes
from es_jax.generate.prompts import Packing, TokenLists
from es_jax.generate.queue import Filled, Generation, Queue, State, begin_queue, decode_queue, fill_queue
from es_jax.generate.sampling import Greedy
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import transpose_kernels, unstack_layers

__all__ = ["Engine", "Generation"]

WIDE = 512  # model width from which on kernels are transposed on CPU


def check_context(
    config: TransformerConfig, longest: int, max_new_tokens: int, *, field: str = "max_new_tokens"
) -> None:
    """Raises ValueError where a prompt of `longest` tokens and `max_new_tokens` more do not fit the model's context."""
    room = config.max_positions - longest
    if max_new_tokens > room:
        raise ValueError(
            f"{field} is {max_new_tokens} and the longest prompt has {longest} tokens, more than the model's context "
            f"of {config.max_positions}: set {field} to at most {room}"
        )


@dataclasses.dataclass(frozen=True)
class Engine(DecodeSpec):
    """Generates for any number of prompts: a row that stops makes room for the next one, on the device (see `queue`).

    A row's tokens depend on its own prompt (and, when sampled, on its index in the list) alone. Programs are compiled
    once for each number, width and shared prefix of the prompts.

    Args:
      config: of the model.
      slots: prompts decoded at once.
      max_prompt_tokens: longest prompt allowed, in tokens.
      max_new_tokens: tokens after which a completion is cut.
      stop_token_ids: token ids that end a row.
      sampler: how a token is chosen.
      logprobs: also return log-probabilities.
      unroll: run the layers one after another rather than in a scan; by default on CPU, where it decodes faster, and
        with `in_place`.
      in_place: write each step's keys and values to the slots' own caches, and attend these by a kernel that reads live
        places alone; by default on GPUs, for models whose heads it takes. Elsewhere the kernel is interpreted, which
        is slow.

    Raises:
      ValueError: a size that is not a whole number above 0, a stop id outside the vocabulary, or `in_place` of layers
        that are not unrolled or heads that the kernel does not take.

    >>> from es_jax.models.transformer import Transformer
    >>> config = TransformerConfig(family="llama", vocab_size=16, width=8, layers=1, heads=2, kv_heads=1,
    ...                            head_dim=4, mlp_dim=8)
    >>> engine = Engine(config, slots=2, max_prompt_tokens=8, max_new_tokens=3, stop_token_ids=(0,))
    >>> engine.generate(Transformer(config).init(jax.random.key(0)), [[1, 2], [3], [4, 5, 6]]).tokens.shape
    (3, 3)
    """

    _: dataclasses.KW_ONLY
    max_prompt_tokens: int

    def layout(self, params: Any) -> Any:
        """The tree as the programs want it: unrolled layers one by one, `with_transposed_kernels`. Use inside jit."""
        return self.with_transposed_kernels(unstack_layers(params)) if self.unrolled else params

    def with_transposed_kernels(self, params: Any) -> Any:
        """The tree, or a part of it, with kernels transposed where CPUs are faster so (docs/speed.md): wide ones of 16
        bits.
        """
        wide = self.unrolled and not self.writes_in_place and self.config.width >= WIDE
        return transpose_kernels(params, itemsize=2) if wide else params

    def packing(self, prompts: TokenLists) -> Packing:
        """How these prompts, and all parts of them, become arrays.

        Raises ValueError for no prompts, an empty one, one longer than `max_prompt_tokens` or than the model's context
        allows beside `max_new_tokens`, or what is not a token of the vocabulary.
        """
        if not len(prompts):
            raise ValueError("there are no prompts: give at least one")
        for i, prompt in enumerate(prompts):
            ids = np.asarray(prompt)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise ValueError(
                    f"prompt {i} is {prompt!r:.60}: it must be a sequence of token ids, which are whole numbers"
                )
            if not 1 <= len(prompt) <= self.max_prompt_tokens:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens: it must have 1 to decode.max_prompt_tokens = "
                    f"{self.max_prompt_tokens}; raise decode.max_prompt_tokens or leave the prompt out"
                )
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise ValueError(
                    f"prompt {i} has token ids {min(prompt)}..{max(prompt)}, but the model's vocabulary is "
                    f"0..{self.config.vocab_size - 1}: use the model's own tokenizer"
                )
        check_context(self.config, max(map(len, prompts)), self.max_new_tokens)
        return Packing.of(prompts, max_prompt_tokens=self.max_prompt_tokens)

    def decode(
        self,
        params: Any,
        tokens: Int32[Array, "Q P"],
        positions: Int32[Array, "Q P"],
        keys: Key[Array, " Q"] | None = None,
        *,
        prefix: Int32[Array, " C"] | None = None,
        axis_name: str | None = None,
        filled: Filled | None = None,
    ) -> Generation:
        """All Q prompts through the slots; pure, for use inside jit, vmap and shard_map.

        Args:
          params: as `layout` gives them; their dtype is the compute dtype.
          tokens, positions, prefix: as `Packing.pack` gives them. A row of padding alone is done from the start.
          keys: one for each row, where the sampler draws. Token t of a row uses `fold_in(key, t)`.
          axis_name: of the vmap around this call, if there is one: what it maps over then runs in step, which keeps
            vmap from choosing between old and new caches in every step.
          filled: of `fill` with the same arguments.
        """
        if keys is None and not isinstance(self.sampler, Greedy):
            raise ValueError(f"sampler is {self.sampler}: give keys [Q] to draw from")
        prefix = jnp.zeros(0, jnp.int32) if prefix is None else prefix
        return decode_queue(*self.begin(params, tokens, positions, keys, prefix, axis_name, filled=filled))

    def fill(
        self,
        params: Any,
        tokens: Int32[Array, "Q P"],
        positions: Int32[Array, "Q P"],
        keys: Key[Array, " Q"] | None = None,
        *,
        prefix: Int32[Array, " C"],
        axis_name: str,
    ) -> Filled:
        """The prefill of `decode`, where `parted` says that it may be done apart; for some lanes of a vmap."""
        return fill_queue(*self.begin(params, tokens, positions, keys, prefix, axis_name))

    def begin(self, *arguments: Any, filled: Filled | None = None) -> tuple[Queue, State]:
        """`begin_queue` of the arguments, for `decode` and `fill`; an engine that ends rows otherwise has its own."""
        return begin_queue(self, *arguments, filled=filled)

    def parted(self, lanes: int, prompts: int, width: int) -> int:
        """How many of so many lanes a prefill takes at a time: all, or a part of which there is a whole number.

        A prefill goes on to the longest prompt of the lanes that it takes, so lanes with prompts of one length belong
        together; on accelerators it takes more of them, whose products are too small otherwise.
        """
        most = 16 if self.unrolled else 64
        if not LoopSizes.of(self, prompts, width, lanes=lanes).single:
            return lanes
        part = next(part for part in range(min(most, lanes), 0, -1) if lanes % part == 0)
        return part if part >= 4 else lanes

    def generate(
        self,
        params: Any,
        prompts: TokenLists,
        *,
        key: PRNGKeyArray | None = None,
        packing: Packing | None = None,
    ) -> Generation:
        """Completions of a list of token-id prompts, in their order, as host arrays.

        Args:
          params: the model's parameters; they are used in the dtype they come in.
          prompts: lists of token ids, 1..max_prompt_tokens each.
          key: needed when the sampler draws; row i uses `fold_in(key, i)`.
          packing: shapes that the prompts fit, where other prompts are to share the program; their own by default.
        """
        if key is None and not isinstance(self.sampler, Greedy):
            raise ValueError(f"sampler is {self.sampler}: pass key= to draw from")
        rows = ceil_div(len(prompts), self.slots) * self.slots
        own = self.packing(prompts)  # it also checks the prompts
        packed = (packing or own).pack(prompts, rows=rows)
        keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
        out = _decode(self, _layout(self, params), packed, keys)
        return jax.tree.map(lambda part: part[: len(prompts)], processes.fetch(out))


def engine_for(
    config: TransformerConfig,
    prompts: TokenLists,
    *,
    slots: int,
    max_new_tokens: int,
    field: str = "max_new_tokens",
    **spec: Any,
) -> Engine:
    """An engine that fits the prompts, with at most as many slots as prompts; `spec` holds its further fields.

    Raises ValueError, which names the `field`, if the model's context has no room for `max_new_tokens` more.
    """
    longest = max(map(len, prompts))
    check_context(config, longest, max_new_tokens, field=field)
    return Engine(
        config, slots=min(slots, len(prompts)), max_prompt_tokens=longest, max_new_tokens=max_new_tokens, **spec
    )


_layout = jax.jit(Engine.layout, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _decode(engine: Engine, params: Any, prompts: Any, keys: Any) -> Generation:
    tokens, positions, prefix = prompts
    return engine.decode(params, tokens, positions, keys, prefix=prefix)
