"""Counts from shapes, against counts made another way."""

import jax
import jax.numpy as jnp
import pytest

from es_jax.core.chips import CHIPS, GIB, chip, find_chip
from es_jax.core.low_rank import LowRank
from es_jax.core.tree import map_named
from es_jax.es.low_rank import LowRankNoise
from es_jax.es.population import Population
from es_jax.models.config import TransformerConfig
from es_jax.models.known_configs import PUBLISHED, published
from es_jax.models.transformer import Transformer, matrix_weights, param_shapes
from es_jax.planning.costs import cache_bytes, decode_memory, forward_flops, pair_numbers

CONFIG = TransformerConfig(
    family="llama", vocab_size=64, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_dim=48,
    tied_embeddings=False,
)  # fmt: skip


def products(jaxpr, times=1):
    """Two FLOPs for each multiplication of every dot_general of a program, loops unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = 1
            for axis in contract:
                depth *= eqn.invars[0].aval.shape[axis]
            total += 2 * times * eqn.outvars[0].aval.size * depth
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                total += products(inner, times * eqn.params.get("length", 1))
    return total


def test_flops_are_those_of_the_forward_pass():
    """The model multiplies whole [T, T] scores; what must be computed is the lower triangle."""
    tokens, prompts = 16, 2
    params = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0))
    last = jnp.full((prompts,), tokens - 1, jnp.int32)
    apply = lambda params, x: Transformer(CONFIG).apply(params, x, logits_at=last)[0]  # noqa: E731
    whole = products(jax.make_jaxpr(apply)(params, jnp.zeros((prompts, tokens), jnp.int32)).jaxpr)
    attention = 4 * CONFIG.layers * CONFIG.heads * CONFIG.head_dim * prompts
    masked = attention * (tokens * tokens - tokens * (tokens + 1) // 2)
    assert forward_flops(CONFIG, prompts, tokens, logits=1) == whole - masked


def test_every_logit_costs_the_head():
    _, head = matrix_weights(CONFIG)
    assert forward_flops(CONFIG, 2, 20, logits=5) == forward_flops(CONFIG, 2, 20, logits=1) + 2 * 4 * 2 * head


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_flops_of_a_member_with_pairs_are_those_of_the_forward_pass(rank):
    """x a bᵀ beside every product with a shared matrix; the lookup, which is not counted, takes one product more."""
    noise, tokens, prompts = LowRankNoise(rank=rank, stacked="layers/"), 16, 2
    params = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0))
    member = Population(2, seed=0).members(0)[0]
    last = jnp.full((prompts,), tokens - 1, jnp.int32)
    apply = lambda params, x: Transformer(CONFIG).apply(params, x, logits_at=last)[0]  # noqa: E731

    def counted(params, member):
        pairs = noise.pair(params, member, sigma=1.0)
        tree = map_named(lambda name, x, pair: LowRank(x, *pair) if noise.is_matrix(name, x) else pair, params, pairs)
        return apply(tree, jnp.zeros((prompts, tokens), jnp.int32))

    more = products(jax.make_jaxpr(counted)(params, member).jaxpr)
    more -= products(jax.make_jaxpr(apply)(params, jnp.zeros((prompts, tokens), jnp.int32)).jaxpr)
    lookup = 2 * rank * CONFIG.width * prompts * tokens
    flops = [forward_flops(CONFIG, prompts, tokens, logits=1, rank=r) for r in (0, rank)]
    assert (
        more - lookup
        == flops[1] - flops[0]
        == 2
        * prompts
        * rank
        * sum(numbers * times for numbers, times in zip(pair_numbers(CONFIG), (tokens, 1), strict=True))
    )


def test_windows_bound_what_is_attended():
    window = TransformerConfig(**{**CONFIG.__dict__, "sliding_window": 4})
    pairs = sum(min(position + 1, 4) - (position + 1) for position in range(20))  # fewer than without a window
    fewer = 4 * CONFIG.layers * CONFIG.heads * CONFIG.head_dim * pairs
    assert forward_flops(window, 1, 20, logits=5) == forward_flops(CONFIG, 1, 20, logits=5) + fewer


def test_bytes():
    assert cache_bytes(CONFIG, 10, 2) == 2 * 3 * 10 * 2 * 8 * 2
    assert decode_memory(CONFIG, 1, 4, 2, steps=2, copy=100, itemsize=2) == 200 + 5 * 3 * 2 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_published_shapes_have_the_published_numbers_of_weights(name, weights):
    """As the hub counts them in the safetensors files."""
    total = 0
    for shape in param_shapes(PUBLISHED[name]).values():
        size = 1
        for n in shape:
            size *= n
        total += size
    assert total == weights


def test_names_of_models_and_chips():
    assert published("Qwen/Qwen2.5-3B-Instruct") == PUBLISHED["Qwen/Qwen2.5-3B"] and published("nobody/nothing") is None
    assert find_chip("TPU v5 lite") is chip("v5e") and find_chip("cpu") is None
    with pytest.raises(ValueError, match="'v5e'"):
        chip("v5f")
    assert len({one.kind for one in CHIPS}) == len(CHIPS) and all(one.memory > 30 * GIB // 2 for one in CHIPS)
