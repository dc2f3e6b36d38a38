"""The dtype policy of docs/models.md, read off the program that JAX makes of a forward pass in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import MIXED

from es_jax.models.cache import KVCache
from es_jax.models.transformer import Transformer, unstack_layers

HALF, SINGLE = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


@pytest.fixture(scope="module", params=["scanned", "unrolled"])
def program(request):
    """Every operation of a step with a cache, all flags on, parameters in bfloat16."""
    model = Transformer(MIXED)
    params = jax.eval_shape(lambda key: model.init(key, dtype=HALF), jax.random.key(0))
    tokens = jnp.zeros((2, 3), jnp.int32)
    stacked = request.param == "scanned"

    def forward(params, tokens):
        cache = KVCache.empty(MIXED, 2, length=4, dtype=HALF, stacked=stacked)
        params = params if stacked else unstack_layers(params)
        return model.apply(params, tokens, positions=tokens, cache=cache)

    return jax.make_jaxpr(forward)(params, tokens)


def _operations(program, *names):
    found = [equation for equation in _equations(program.jaxpr) if equation.primitive.name in names]
    assert found, names
    return found


def _float_inputs(equation):
    return {v.aval.dtype for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)}


def test_products_take_bfloat16_and_accumulate_in_float32(program):
    for product in _operations(program, "dot_general"):
        assert _float_inputs(product) == {HALF}
        assert product.outvars[0].aval.dtype == SINGLE and product.params["preferred_element_type"] == SINGLE


@pytest.mark.parametrize(
    "what, names", [("norms", ("rsqrt",)), ("rotary positions", ("cos", "sin")), ("softmax", ("exp", "reduce_max"))]
)
def test_float32_throughout(program, what, names):
    for operation in _operations(program, *names):
        assert _float_inputs(operation) == {SINGLE}, what


def test_what_leaves_a_layer_and_the_cache_is_bfloat16_and_the_logits_are_float32(program):
    logits, *cache = program.out_avals
    assert logits.dtype == SINGLE
    assert {leaf.dtype for leaf in cache if jnp.issubdtype(leaf.dtype, jnp.floating)} == {HALF}
    params = jax.eval_shape(lambda key: Transformer(MIXED).init(key, dtype=HALF), jax.random.key(0))
    stream = jax.eval_shape(Transformer(MIXED).trace, params, jnp.zeros((1, 3), jnp.int32))
    assert {x.dtype for x in stream} == {HALF}


def test_a_sum_that_bfloat16_cannot_hold_survives():
    """256 + 1 + … + 1 stays 256 in a bfloat16 accumulator."""
    from es_jax.models.layers import linear

    x, kernel = jnp.ones((1, 257), HALF), jnp.ones((257, 1), HALF).at[0].set(256)
    assert float(linear(x, kernel, accumulated=True)[0, 0]) == 512.0
    assert np.asarray(linear(x, kernel)).dtype == HALF
