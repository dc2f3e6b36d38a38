"""One decoder-only transformer for every family: parameters are a plain tree, `apply` is a pure function."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from es_jax.core.tree import map_named, named_leaves
from es_jax.models.cache import KVCache, attention_mask
from es_jax.models.config import TransformerConfig
from es_jax.models.layers import INIT_STD, KV, Block, Masks, RMSNorm, Transposed, linear, softcap
from es_jax.models.rope import Angles, rope_angles, rope_frequencies

Params = dict[str, Any]
View = tuple[Angles, Masks]  # what a layer knows of positions: how far they turn, who sees whom


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

    With `layers` stacked the layers are scanned (compiles fast); with the tuple that `unstack_layers` makes
    they are unrolled (decodes faster). The compute dtype is the embedding's.

    >>> model = Transformer(TransformerConfig(family="llama", vocab_size=32, width=16, layers=2, heads=4,
    ...                                       kv_heads=2, head_dim=8, mlp_dim=24))
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> logits, _ = jax.jit(model.apply)(params, jnp.zeros((1, 5), jnp.int32))
    >>> logits.shape
    (1, 5, 32)
    """

    config: TransformerConfig

    def init(self, key: Array, *, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters: normal of std 0.02, norms the identity, biases zero; drawn in float32, then cast."""
        c = self.config
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, c.width))
        positions = jnp.zeros((1, 1), jnp.int32)
        view = _Views.of(c, positions, [positions]).of_layer(0)
        layers = jax.vmap(lambda k: Block(c).init(k, x, *view, None)["params"])(jax.random.split(layers_key, c.layers))
        params = {
            "embed": {"embedding": INIT_STD * jax.random.normal(embed_key, (c.vocab_size, c.width))},
            "layers": layers,
            "final_norm": {"scale": jnp.full(c.width, 0.0 if c.norm_plus_one else 1.0)},
        }
        if not c.tied_embeddings:
            params["head"] = {"kernel": INIT_STD * jax.random.normal(head_key, (c.width, c.vocab_size))}
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T V"] | Float[Array, "B V"], KVCache | None]:
        """Next-token logits, float32, and the cache with the T tokens added (None without a cache).

        `positions` counts each row's tokens from 0 and is -1 at padding, whose token id does not matter;
        None means 0..T-1 and is allowed only without a cache. A query at position p attends the tokens (of
        the cache when there is one, and of `tokens`) at positions 0..p. Padding's logits mean nothing, but
        are finite. `logits_at` [B], in 0..T-1: only the logits of that token of each row, [B, V].
        Raises ValueError for a cache without positions, too short, or stacked unlike `params`.
        """
        hidden, cache = self.hidden(params, tokens, positions=positions, cache=cache)
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        logits = self.logits(params, hidden)
        return (logits if logits_at is None else logits[:, 0]), cache

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        around: Callable[[Callable], Callable] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The residual stream after the last layer and the final norm, and the cache; see `apply`.

        `around` is given the function of a layer, (x, layer, view, kv) → (x, kv), and makes the one that runs in its
        place: one that is computed again for its gradient, or one that gathers the layer's weights first.
        """
        if positions is None:
            if cache is not None:
                raise ValueError("positions = None with a cache: give the position of every token [B, T]")
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        start = None if cache is None else cache.index
        cache = None if cache is None else cache.advance(positions)
        held = [positions] if cache is None else [*(past.positions for past in cache.past), cache.positions]
        views = _Views.of(self.config, positions, held)
        block: Callable = functools.partial(self._block, start=start)
        block = block if around is None else around(block)
        run = _unrolled if isinstance(params["layers"], list | tuple) else _scanned
        x, cache = run(block, self._embed(params, tokens), params["layers"], views, cache)
        normed: Any = RMSNorm(self.config).apply({"params": params["final_norm"]}, x)
        return normed, cache

    def trace(self, params: Params, tokens: Int[Array, "B T"]) -> list[Float[Array, "B T D"]]:
        """The residual stream before the first layer and behind each, L + 1 arrays, without the final norm."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        views = _Views.of(self.config, positions, [positions])
        stream = [self._embed(params, tokens)]
        for i, layer in enumerate(unstack_layers(params)["layers"]):
            stream.append(self._block(stream[-1], layer, views.of_layer(i), None)[0])
        return stream

    def _embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = jnp.take(params["embed"]["embedding"], tokens, axis=0, mode="clip")
        return x * jnp.asarray(self.config.width**0.5, x.dtype) if self.config.scale_embeddings else x

    def _block(
        self, x: Array, layer: Params, view: View, held: list[KV] | None, start: Array | None = None
    ) -> tuple[Array, Any]:
        cached = None if held is None else (held[-1], start, tuple(held[:-1]))
        out: Any = Block(self.config).apply({"params": layer}, x, *view, cached)
        return out[0], (None if held is None else out[1])

    def logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The output head applied to `hidden`'s result: float32 logits."""
        if self.config.tied_embeddings:
            embedding = params["embed"]["embedding"]
            if isinstance(params.get("layers"), list | tuple):  # unrolled, as on CPU
                logits = linear(hidden, Transposed(embedding), accumulated=True)
            else:
                contract = (((2,), (1,)), ((), ()))
                logits = jax.lax.dot_general(hidden, embedding, contract, preferred_element_type=jnp.float32)
        else:
            logits = linear(hidden, params["head"]["kernel"], accumulated=True)
        return softcap(logits, self.config.final_softcap)


def unstack_layers(params: Params) -> Params:
    """The same tree with `layers` as a tuple of L per-layer trees; inside jit the slices are made once.

    >>> tree = unstack_layers({"layers": {"norm": jnp.ones((2, 4))}})
    >>> len(tree["layers"]), tree["layers"][0]["norm"].shape
    (2, (4,))
    """
    stacked = params["layers"]
    if isinstance(stacked, list | tuple):
        return params
    count = jax.tree.leaves(stacked)[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count))}


def transpose_kernels(params: Params, *, itemsize: int) -> Params:
    """The same tree, of whatever layers, with every kernel of numbers of so many bytes `Transposed`.

    >>> transpose_kernels({"head": {"kernel": jnp.ones((2, 4))}}, itemsize=4)["head"]["kernel"].held.shape
    (4, 2)
    """

    def held(name: str, leaf: Array) -> Any:
        turn = name.endswith("kernel") and leaf.dtype.itemsize == itemsize
        return Transposed(leaf.swapaxes(-1, -2)) if turn else leaf

    return map_named(held, params)


def param_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Path → shape of every parameter, like {"layers/attn/q/kernel": (L, D, H*hd), ...}."""
    return dict(_shapes(config))


def matrix_weights(config: TransformerConfig) -> tuple[int, int]:
    """Weights that multiply every token's activations: in the layers, and in the output head.

    >>> matrix_weights(TransformerConfig(family="llama", vocab_size=10, width=4, layers=2, heads=1, kv_heads=1,
    ...                                  head_dim=4, mlp_dim=8))
    (320, 40)
    """
    shapes = param_shapes(config).items()
    layers = sum(math.prod(shape) for name, shape in shapes if name.startswith("layers/") and name.endswith("kernel"))
    return layers, config.width * config.vocab_size


@functools.lru_cache(maxsize=64)
def _shapes(config: TransformerConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0))
    return tuple((name, leaf.shape) for name, leaf in named_leaves(tree))


@dataclasses.dataclass(frozen=True)
class _Views:
    """The view of each kind of layer (local or not, turned or not), and each layer's kind as an index into them."""

    distinct: list[View]
    kinds: tuple[int, ...]

    @classmethod
    def of(cls, config: TransformerConfig, query: Array, held: Sequence[Array]) -> "_Views":
        def view(local: bool, rope: bool) -> View:
            frequencies = rope_frequencies(config, local=local)  # all zero: turned by no angle
            angles = rope_angles(query, frequencies if rope else np.zeros_like(frequencies))
            window = config.sliding_window if local else None
            return angles, tuple(attention_mask(query, positions, window=window) for positions in held)

        kinds = tuple(dict.fromkeys(config.layer_kinds))
        return cls([view(*kind) for kind in kinds], tuple(map(kinds.index, config.layer_kinds)))

    def of_layer(self, i: int) -> View:
        return self.distinct[self.kinds[i]]

    def scanned(self) -> tuple[Array | None, Callable[[Array | None], View]]:
        """What a scan goes over, and the view it makes of a slice: nothing where all layers are of one kind."""
        if len(self.distinct) == 1:
            return None, lambda kind: self.distinct[0]
        stacked = jax.tree.map(lambda *views: jnp.stack(views), *self.distinct)
        return jnp.array(self.kinds, jnp.int32), lambda kind: jax.tree.map(lambda x: x[kind], stacked)


def _scanned(block: Any, x: Array, layers: Params, views: _Views, cache: KVCache | None) -> tuple[Array, Any]:
    kinds, view = views.scanned()
    if cache is None:
        return jax.lax.scan(lambda x, xs: block(x, xs[0], view(xs[1]), None), x, (layers, kinds))[0], None
    if not cache.stacked:
        raise ValueError("stacked layers need KVCache.empty(..., stacked=True), this cache is per layer")
    pieces = [*((past.k, past.v) for past in cache.past), (cache.k, cache.v)]
    x, (k, v) = jax.lax.scan(lambda x, xs: block(x, xs[0], view(xs[1]), xs[2]), x, (layers, kinds, pieces))
    return x, cache.replace(k=k, v=v)  # type: ignore[attr-defined]


def _unrolled(block: Any, x: Array, layers: Any, views: _Views, cache: KVCache | None) -> tuple[Array, Any]:
    if cache is not None and cache.stacked:
        raise ValueError("unstacked layers need KVCache.empty(..., stacked=False), this cache is stacked")
    pairs = []
    for i, layer in enumerate(layers):
        held = None if cache is None else [*((past.k[i], past.v[i]) for past in cache.past), (cache.k[i], cache.v[i])]
        x, kv = block(x, layer, views.of_layer(i), held)
        pairs.append(kv)
    if cache is None:
        return x, None
    keys, values = zip(*pairs, strict=True)
    return x, cache.replace(k=keys, v=values)  # type: ignore[attr-defined]
