"""One decoder-only transformer for every family: the parameters are a plain tree, and `apply` is a pure function."""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from es_jax.core.low_rank import LowRank
from es_jax.core.tree import map_named, named_leaves
from es_jax.models.cache import KVCache, Past, RowCache, attention_mask
from es_jax.models.config import TransformerConfig
from es_jax.models.layers import INIT_STD, KV, Block, Masks, RMSNorm, Stream, Transposed, dot_general, linear, softcap
from es_jax.models.rope import Angles, rope_angles, rope_frequencies

Params = dict[str, Any]
PerToken = Int[Array, "B T"]  # ids or positions
View = tuple[Angles, Masks]  # a layer's view of positions: rotations and masks


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The forward pass of a `TransformerConfig`.

    The parameters are a plain tree, stacked over the L layers:

        embed/embedding [V, D]                  final_norm/scale [D]      head/kernel [D, V] when untied
        layers/attn_norm/scale, layers/mlp_norm/scale [L, D]
        layers/attn/q/kernel [L, D, H*hd], k and v/kernel [L, D, KH*hd], and /bias [L, ...] with qkv_bias
        layers/attn/o/kernel [L, H*hd, D]       layers/mlp/gate and up/kernel [L, D, F], down/kernel [L, F, D]
        layers/attn/q_norm and k_norm/scale [L, hd] with qk_norm
        layers/attn_post_norm and mlp_post_norm/scale [L, D] with post_norms

    With `layers` stacked, the layers run in a scan, which compiles fast. With the tuple that `unstack_layers` makes
    they are unrolled, which decodes faster. The embedding's dtype is the compute dtype.

    Args:
      config: the model's sizes and options.

    Examples:
      >>> model = Transformer(TransformerConfig(family="llama", vocab_size=32, width=16, layers=2, heads=4,
      ...                                       kv_heads=2, head_dim=8, mlp_dim=24))
      >>> params = jax.jit(model.init)(jax.random.key(0))
      >>> logits, _ = jax.jit(model.apply)(params, jnp.zeros((1, 5), jnp.int32))
      >>> logits.shape
      (1, 5, 32)
    """

    config: TransformerConfig

    def init(self, key: Array, *, dtype: DTypeLike = jnp.float32) -> Params:
        """Draws random parameters: kernels are normal with std 0.02, norms are the identity, and biases are zero.

        Args:
          key: a random key.
          dtype: the parameters' dtype. They are drawn in float32 and then cast.

        Returns:
          The tree that the class describes, with stacked layers.
        """
        c = self.config
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, c.width))
        positions = jnp.zeros((1, 1), jnp.int32)
        view = _views(c, positions, [])[c.layer_kinds[0]]
        layers = jax.vmap(lambda k: Block(c).init(k, x, *view, ())["params"])(jax.random.split(layers_key, c.layers))
        params = {
            "embed": {"embedding": INIT_STD * jax.random.normal(embed_key, (c.vocab_size, c.width))},
            "layers": layers,
            "final_norm": {"scale": jnp.full(c.width, 1.0 - c.norm_plus_one)},
        }
        if not c.tied_embeddings:
            params["head"] = {"kernel": INIT_STD * jax.random.normal(head_key, (c.width, c.vocab_size))}
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def apply(
        self,
        params: Params,
        tokens: PerToken,
        *,
        positions: PerToken | None = None,
        cache: KVCache | RowCache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], KVCache | RowCache | None]:
        """Computes next-token logits.

        A query at position p attends to the tokens at positions 0..p, those of the cache among them.

        Args:
          params: the tree that the class describes, with layers stacked or not.
          tokens: int32 [B, T], ids in 0..V − 1.
          positions: int32 [B, T]. They count each row's tokens from 0 and are −1 at padding, whose token id does not
            matter. None means 0..T − 1, and is allowed only without a cache.
          cache: the keys and values of the tokens before these. A `RowCache` takes one token a row, T = 1.
          logits_at: int32 [B] in 0..T − 1: compute only the logits of that token of each row.

        Returns:
          The logits, float32 [B, T, V], or [B, V] with `logits_at`; and the cache with the T tokens added, None without
            a cache. The logits of padding mean nothing, but are finite.

        Raises:
          ValueError: there is a cache but there are no positions, or the cache is too short or is stacked unlike
            `params`.
        """
        hidden, cache = self.hidden(params, tokens, positions=positions, cache=cache)
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        logits = self.logits(params, hidden)
        return (logits if logits_at is None else logits[:, 0]), cache

    def hidden(
        self,
        params: Params,
        tokens: PerToken,
        *,
        positions: PerToken | None = None,
        cache: KVCache | RowCache | None = None,
        around: Callable[[Callable], Callable] = lambda block: block,
    ) -> tuple[Stream, KVCache | RowCache | None]:
        """Computes the residual stream after the last layer and the final norm.

        Args:
          params: as for `apply`.
          tokens: as for `apply`.
          positions: as for `apply`.
          cache: as for `apply`.
          around: makes, of a layer's function (x, layer, view, kv) → (x, kv), the one that runs in its place. It may
            compute the layer again for its gradient, or gather the layer's weights first.

        Returns:
          The stream, [B, T, D] in the compute dtype; and the cache as from `apply`.

        Raises:
          ValueError: there is a cache but there are no positions, or the cache is too short or is stacked unlike
            `params`.
        """
        if positions is None:
            if cache is not None:
                raise ValueError("positions = None with a cache: give the position of every token [B, T]")
            positions = _count_up(tokens)
        pieces: list[Past | RowCache] = []  # the tokens before these
        unrolled = isinstance(params["layers"], list | tuple)
        if isinstance(cache, RowCache):
            pieces = [*cache.past, cache]
        elif cache is not None:
            if isinstance(cache.k, tuple) != unrolled:
                raise ValueError(
                    f"{'unstacked' if unrolled else 'stacked'} layers need KVCache.empty(..., "
                    f"stacked={not unrolled}), but this cache is {'stacked' if unrolled else 'per layer'}"
                )
            cache.check_room(tokens.shape[1])
            pieces = [*cache.past, *cache.used_before(tokens.shape[1])]
        views = _views(self.config, positions, pieces)
        run = self._unrolled if unrolled else self._scanned
        kept = [piece.kv for piece in pieces]
        block = functools.partial(self._block, keep=cache is not None)
        x, kv = run(around(block), self._embed(params, tokens), params["layers"], views, kept)
        if isinstance(cache, RowCache):
            cache = dataclasses.replace(
                cache, k=kv[0], v=kv[1], length=cache.length + (positions[:, 0] >= 0).astype(jnp.int32)
            )
        elif cache is not None:
            k, v = kv
            cache = cache.extended(k, v, positions)
        normed: Any = RMSNorm(self.config).apply({"params": params["final_norm"]}, x)
        return normed, cache

    def trace(self, params: Params, tokens: PerToken) -> list[Stream]:
        """Computes the residual stream before the first layer and after each one, without the final norm.

        Args:
          params: as for `apply`.
          tokens: int32 [B, T].

        Returns:
          L + 1 arrays [B, T, D] in the compute dtype.
        """
        positions = _count_up(tokens)
        views = _views(self.config, positions, [])
        stream = [self._embed(params, tokens)]
        for layer, kind in zip(unstack_layers(params)["layers"], self.config.layer_kinds, strict=True):
            stream.append(self._block(stream[-1], layer, views[kind], [])[0])
        return stream

    def empty_cache(self, params: Params, rows: int, length: int, *, past: tuple[Past, ...] = ()) -> KVCache:
        """Makes an empty cache of the parameters' dtype, stacked as they are.

        Args:
          params: as for `apply`.
          rows: B, the rows.
          length: how many tokens each row has room for.
          past: caches of earlier tokens that are read and not written.

        Returns:
          The cache for `apply`.
        """
        return KVCache.empty(
            self.config, rows, length=length, dtype=params["embed"]["embedding"].dtype, past=past,
            stacked=not isinstance(params["layers"], list | tuple),
        )  # fmt: skip

    def _embed(self, params: Params, tokens: PerToken) -> Stream:
        table = params["embed"]["embedding"]
        x = table.rows(tokens) if isinstance(table, LowRank) else jnp.take(table, tokens, axis=0, mode="clip")
        return x * jnp.asarray(self.config.width**0.5, x.dtype) if self.config.scale_embeddings else x

    def _block(self, x: Array, layer: Params, view: View, attended: Sequence[KV], *, keep: bool = False) -> Any:
        x, kv = Block(self.config).apply({"params": layer}, x, *view, attended)
        return x, kv if keep else None

    # Run the layers in sequence; returns x, and the tokens' keys and values if they are kept.
    def _scanned(self, block: Any, x: Array, layers: Params, views: dict, pieces: list[Any]) -> tuple[Array, Any]:
        kinds, stacked = None, next(iter(views.values()))
        if len(views) > 1:
            kinds = jnp.array([list(views).index(kind) for kind in self.config.layer_kinds], jnp.int32)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *views.values())

        def step(x: Array, xs: Any) -> Any:
            layer, kind, kv = xs
            return block(x, layer, stacked if kind is None else jax.tree.map(lambda leaf: leaf[kind], stacked), kv)

        return jax.lax.scan(step, x, (layers, kinds, pieces))

    def _unrolled(self, block: Any, x: Array, layers: Any, views: dict, pieces: list[Any]) -> tuple[Array, Any]:
        pairs = []
        for i, (layer, kind) in enumerate(zip(layers, self.config.layer_kinds, strict=True)):
            x, kv = block(x, layer, views[kind], [(k[i], v[i]) for k, v in pieces])
            pairs.append(kv)
        return x, None if pairs[0] is None else tuple(zip(*pairs, strict=True))

    def logits(self, params: Params, hidden: Stream) -> Float[Array, "B T V"]:
        """Applies the output head.

        Args:
          params: as for `apply`; the layers are not used.
          hidden: [B, T, D], from `hidden`.

        Returns:
          float32 [B, T, V].
        """
        if not self.config.tied_embeddings:
            logits = linear(hidden, params["head"]["kernel"], accumulated=True)
        else:
            table, correction = params["embed"]["embedding"], None
            if isinstance(table, LowRank):
                table, correction = table.base, table.correction(hidden, transposed=True)
            if isinstance(params.get("layers"), list | tuple):  # unrolled, as on CPU
                logits = linear(hidden, Transposed(table), accumulated=True)
            else:
                logits = dot_general(hidden, table, (((2,), (1,)), ((), ())))
            logits = logits if correction is None else logits + correction
        return softcap(logits, self.config.final_softcap)


def _count_up(tokens: Array) -> PerToken:
    """The positions 0..T-1 of every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)


def unstack_layers(params: Params) -> Params:
    """The same tree with `layers` as a tuple of L per-layer trees; inside jit the slices are made only once."""
    stacked = params["layers"]
    if isinstance(stacked, list | tuple):
        return params
    count = jax.tree.leaves(stacked)[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count))}


def without_layers(params: Params) -> Params:
    """All parameters except those of the layers."""
    return {name: leaf for name, leaf in params.items() if name != "layers"}


def transpose_kernels(params: Params, *, itemsize: int) -> Params:
    """The same tree, with stacked or unstacked layers, in which every kernel with items of `itemsize` bytes is
    `Transposed`."""

    def transpose(name: str, leaf: Array) -> Any:
        wanted = name.endswith("kernel") and leaf.dtype.itemsize == itemsize
        return Transposed(leaf.swapaxes(-1, -2)) if wanted else leaf

    return map_named(transpose, params)


@functools.lru_cache(maxsize=64)
def param_shapes(config: TransformerConfig) -> Mapping[str, tuple[int, ...]]:
    """Path → shape of every parameter, like {"layers/attn/q/kernel": (L, D, H*hd), ...}."""
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0))
    return types.MappingProxyType({name: leaf.shape for name, leaf in named_leaves(tree)})


def matrix_weights(config: TransformerConfig) -> tuple[int, int]:
    """Number of weights that multiply every token's activations: in the layers, and in the output head."""
    shapes = param_shapes(config).items()
    layers = sum(math.prod(shape) for name, shape in shapes if name.startswith("layers/") and name.endswith("kernel"))
    return layers, config.width * config.vocab_size


def _views(config: TransformerConfig, query: Array, pieces: Sequence[Past | RowCache]) -> dict[tuple[bool, bool], View]:
    """The view for each kind of layer, (local, rope), in the config: of the pieces, and of the tokens themselves unless
    they are first added to the last piece."""

    def view(local: bool, rope: bool) -> View:
        frequencies = rope_frequencies(config, local=local)  # all zero: no rotation
        angles = rope_angles(query, frequencies if rope else np.zeros_like(frequencies))
        window = config.sliding_window if local else None
        mask = functools.partial(attention_mask, query, window=window)
        masks: list[Any] = [mask(piece.positions) for piece in pieces if isinstance(piece, Past)]
        own: list[Any] = [piece.places(query, window=window) for piece in pieces if isinstance(piece, RowCache)]
        return angles, (*masks, *(own or [mask(query)]))

    return {kind: view(*kind) for kind in dict.fromkeys(config.layer_kinds)}
