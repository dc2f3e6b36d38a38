"""Batched generation: a queue of prompts through a fixed number of batch slots."""

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
    """Checks that a prompt of `longest` tokens and `max_new_tokens` more fit the model's context.

    Args:
      config: the model's sizes and options.
      longest: tokens of the longest prompt.
      max_new_tokens: tokens after which a completion is cut.
      field: what the message calls `max_new_tokens`.

    Raises:
      ValueError: they do not fit.
    """
    room = config.max_positions - longest
    if max_new_tokens > room:
        raise ValueError(
            f"{field} is {max_new_tokens} and the longest prompt has {longest} tokens, more than the model's context "
            f"of {config.max_positions}: set {field} to at most {room}"
        )


@dataclasses.dataclass(frozen=True)
class Engine(DecodeSpec):
    """Generates completions for any number of prompts on a fixed number of slots.

    A row that stops makes room for the next prompt, on the device. A row's tokens depend only on its own prompt and,
    when they are drawn, on the prompt's index in the list. One program is compiled for each number, width and shared
    prefix of the prompts.

    Args:
      config: the model's sizes and options.
      slots: how many prompts are decoded at once, at least 1.
      max_prompt_tokens: the longest prompt that is allowed, in tokens, at least 1.
      max_new_tokens: tokens after which a completion is cut, at least 1.
      stop_token_ids: token ids that end a row, each in 0..V − 1.
      sampler: how a token is chosen: `Greedy`, `Temperature`, `TopK` or `TopP`.
      logprobs: True also returns each token's log-probability.
      unroll: True runs the layers one after another instead of in a scan. The default is True on CPU, where it decodes
        faster, and with `in_place`.
      in_place: True writes each step's keys and values into the slots' own caches, and attends to these with a kernel
        that reads only places in use. The default is True on GPUs for models whose heads the kernel takes. Elsewhere
        the kernel is interpreted, which is slow.

    Raises:
      ValueError: a size is not a whole number of at least 1; a stop id is outside the vocabulary; or `in_place` is True
        for layers that are not unrolled or for heads that the kernel does not take.

    Examples:
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
        """Arranges parameters as the programs want them: unrolled layers one by one, and `with_transposed_kernels`.

        Use it inside jit.

        Args:
          params: the model's parameters, with stacked layers.

        Returns:
          The tree for `decode`.
        """
        return self.with_transposed_kernels(unstack_layers(params)) if self.unrolled else params

    def with_transposed_kernels(self, params: Any) -> Any:
        """Transposes wide kernels of 16 bits, where CPUs are faster with them (docs/speed.md).

        Args:
          params: the model's parameters, or a part of them.

        Returns:
          The tree, changed or not.
        """
        wide = self.unrolled and not self.writes_in_place and self.config.width >= WIDE
        return transpose_kernels(params, itemsize=2) if wide else params

    def packing(self, prompts: TokenLists) -> Packing:
        """Decides how these prompts, and any part of them, become arrays.

        Args:
          prompts: lists of token ids, at least one list.

        Returns:
          The shapes, whose `pack` makes the arrays.

        Raises:
          ValueError: there are no prompts; one is empty, is longer than `max_prompt_tokens` or leaves no room for
            `max_new_tokens` in the model's context; or one holds something that is not a token of the vocabulary.
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
        """Runs Q prompts through the slots. It is pure, for use inside jit, vmap and shard_map.

        Args:
          params: what `layout` returns. Their dtype is the compute dtype.
          tokens: int32 [Q, P], from `Packing.pack`. A row that is only padding is done from the start.
          positions: int32 [Q, P], from `Packing.pack`; −1 at padding.
          keys: [Q], one random key for each row, where the sampler draws. Token t of a row uses `fold_in(key, t)`.
          prefix: int32 [C], from `Packing.pack`: the tokens that all prompts begin with. None is the same as no tokens.
          axis_name: the name of the vmap around this call, if there is one. The mapped calls then run in step, so vmap
            does not have to choose between old and new caches in every step.
          filled: what `fill` returned for the same arguments, to skip the prefill.

        Returns:
          The completions of all Q rows.

        Raises:
          ValueError: the sampler draws and there are no keys.
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
        """Runs only the prefill of `decode`, where `parted` says that it can be done separately.

        Args:
          params: as for `decode`.
          tokens: as for `decode`.
          positions: as for `decode`.
          keys: as for `decode`.
          prefix: as for `decode`.
          axis_name: the name of the vmap around this call, which may map over some of the members alone.

        Returns:
          What `decode` takes as `filled`.
        """
        return fill_queue(*self.begin(params, tokens, positions, keys, prefix, axis_name))

    def begin(self, *arguments: Any, filled: Filled | None = None) -> tuple[Queue, State]:
        """Calls `begin_queue` for `decode` and `fill`. An engine that ends rows by another rule overrides it.

        Args:
          *arguments: the positional arguments of `begin_queue`, without the engine.
          filled: what `fill` returned.

        Returns:
          The queue, and the state of its loops.
        """
        return begin_queue(self, *arguments, filled=filled)

    def parted(self, lanes: int, prompts: int, width: int) -> int:
        """Says how many mapped calls a prefill takes at a time: all of them, or a divisor of their number.

        A prefill goes on to the longest prompt among the calls that it takes, so calls with prompts of one length
        belong together. On accelerators it takes more of them, because small matrix products are slow there.

        Args:
          lanes: how many calls a vmap maps over.
          prompts: how many prompts each has.
          width: tokens that the prompts are padded to.

        Returns:
          A divisor of `lanes`.
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
        """Generates completions of token-id prompts.

        Args:
          params: the model's parameters, with stacked layers. Their dtype is the compute dtype.
          prompts: Q lists of token ids, each of 1..max_prompt_tokens tokens.
          key: a random key, where the sampler draws. Row i uses `fold_in(key, i)`.
          packing: shapes that the prompts fit, so that other prompts can share the program. By default the shapes are
            those of these prompts.

        Returns:
          The completions in the prompts' order, as host arrays.

        Raises:
          ValueError: the sampler draws and there is no key, or the prompts are not what `packing` accepts.
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
