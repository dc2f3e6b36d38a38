"""The kernel that attends live places, interpreted, against the attention of all other paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.models.config import TransformerConfig
from es_jax.models.decode_attention import (
    BLOCK,
    NAME,
    Places,
    attend_places,
    bytes_moved,
    supports,
    whole_blocks,
    written,
)  # fmt: skip
from es_jax.models.layers import attend

ROWS, PLACES, SHARED = 5, 2 * BLOCK, 24
END = np.int32([0, 1, BLOCK, BLOCK + 7, PLACES])  # nothing, one place, a block, a part of a second, all


def arrays(heads, kv_heads, head_dim, dtype=jnp.float32, rows=ROWS):
    keys = jax.random.split(jax.random.key(4), 5)
    shapes = [
        (rows, 1, heads, head_dim), (rows, kv_heads, head_dim, PLACES), (rows, kv_heads, PLACES, head_dim),
        (1, kv_heads, head_dim, SHARED), (1, kv_heads, SHARED, head_dim),
    ]  # fmt: skip
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def places_of(first):
    return Places(new=jnp.asarray(np.maximum(END - 1, 0)), first=jnp.asarray(first), end=jnp.asarray(END))


@pytest.mark.parametrize("shared", [False, True], ids=["own places", "a shared prefix too"])
@pytest.mark.parametrize("window", [None, 3, BLOCK + 2])
@pytest.mark.parametrize(("heads", "kv_heads", "cap"), [(4, 4, None), (14, 2, 5.0), (20, 1, None)])
def test_it_equals_the_attention_of_the_other_paths(heads, kv_heads, cap, window, shared):
    q, k, v, shared_k, shared_v = arrays(heads, kv_heads, 16)
    first = np.zeros_like(END) if window is None else np.maximum(END - window, 0)
    place = np.arange(PLACES)
    mask = jnp.asarray((place >= first[:, None]) & (place < END[:, None]))[:, None]
    seen = jnp.asarray(np.arange(SHARED) >= np.int32([20, 0, 3, 9, 23])[:, None])[:, None]
    pieces, masks = ([(shared_k, shared_v)], [seen]) if shared else ([], [])
    options = {"scale": 0.3, "cap": cap}
    got = attend_places(q, (k, v), places_of(first), shared=pieces, masks=masks, **options)
    wanted = attend(q, [*pieces, (k, v)], masks=[*masks, mask], **options)
    rows = slice(0 if shared else 1, None)  # a row that attends nothing has a result that means nothing
    np.testing.assert_allclose(got[rows], wanted[rows], atol=2e-6)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("rows", [1, 5, 300], ids=["many splits", "some splits", "one split"])
def test_splits_change_nothing_but_the_order_of_sums(rows):
    q, k, v, *_ = arrays(4, 2, 16, rows=rows)
    end = jnp.asarray(np.resize([PLACES, 3, BLOCK + 1], rows).astype(np.int32))
    places = Places(end - 1, jnp.zeros_like(end), end)
    mask = (jnp.arange(PLACES)[None] < end[:, None])[:, None]
    np.testing.assert_allclose(
        attend_places(q, (k, v), places, scale=0.25), attend(q, [(k, v)], masks=[mask], scale=0.25), atol=2e-6
    )


def test_bfloat16_is_as_near_to_float32_as_on_the_other_paths():
    exact = arrays(8, 2, 32)
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    mask = (jnp.arange(PLACES)[None] < END[:, None])[:, None]
    wanted = attend(exact[0], [(exact[1], exact[2])], masks=[mask], scale=0.2)[1:]
    here = attend_places(rounded[0], (rounded[1], rounded[2]), places_of(np.zeros_like(END)), scale=0.2)[1:]
    there = attend(rounded[0], [(rounded[1], rounded[2])], masks=[mask], scale=0.2)[1:]
    errors = [float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - wanted) ** 2))) for x in (here, there)]
    assert here.dtype == jnp.bfloat16 and errors[0] < 1.1 * errors[1]


def test_what_lies_outside_the_places_does_not_matter():
    q, k, v, *_ = arrays(4, 2, 16)
    places, outside = places_of(np.maximum(END - 5, 0)), np.ones((ROWS, PLACES), bool)
    for row, end in enumerate(END):
        outside[row, max(end - 5, 0) : end] = False
    other_k = jnp.where(outside[:, None, None], 1e4, k)
    other_v = jnp.where(outside[:, None, :, None], -1e4, v)
    one, other = (attend_places(q, kv, places, scale=0.3) for kv in ((k, v), (other_k, other_v)))
    np.testing.assert_array_equal(one[1:], other[1:])


def test_a_token_is_written_at_its_place_alone():
    _, k, v, *_ = arrays(4, 2, 16)
    new = jnp.int32([0, 1, BLOCK, 77, PLACES - 1])
    own_k, own_v = jnp.full((ROWS, 2, 16, 1), 5.0), jnp.full((ROWS, 2, 1, 16), 7.0)
    keys, values = written((k, v), own_k, own_v, new)
    here = np.arange(PLACES) == np.asarray(new)[:, None]
    np.testing.assert_array_equal(keys, np.where(here[:, None, None], 5.0, k))
    np.testing.assert_array_equal(values, np.where(here[:, None, :, None], 7.0, v))


def test_caches_of_broken_blocks_are_refused():
    q, k, v, *_ = arrays(4, 2, 16)
    with pytest.raises(ValueError, match=r"have 100 places, which is not a whole number of blocks: use 128"):
        attend_places(q, (k[..., :100], v[:, :, :100]), places_of(np.zeros_like(END)), scale=1.0)


def test_heads_that_are_no_power_of_two_are_left_to_the_other_paths():
    shape = dict(family="llama", vocab_size=8, width=8, layers=1, heads=2, kv_heads=1, mlp_dim=8)
    taken = [n for n in (4, 8, 16, 32, 64, 80, 96, 128, 256, 512) if supports(TransformerConfig(head_dim=n, **shape))]
    assert taken == [16, 32, 64, 128, 256]


def test_bytes_are_counted_at_the_lengths_given():
    operands, results = [4, 4, 100, 20 * BLOCK, 30 * BLOCK], [100]
    full = bytes_moved(operands, results, lengths=[10 * BLOCK - 1])
    assert full == sum(operands) + sum(results)
    assert bytes_moved(operands, results, lengths=[10 * BLOCK, 5 * BLOCK, 1]) == 208 + 50 * BLOCK * (10 + 5 + 1) / 30
    assert whole_blocks(1) == BLOCK and whole_blocks(BLOCK + 1) == 2 * BLOCK and NAME == "decode_attention"
