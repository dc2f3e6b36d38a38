"""A function of every element of an array and of its index, in one pass over memory: a Pallas kernel for GPUs.

XLA has no loop inside a kernel, so a sum that is made in many turns goes through memory at each of them; and it writes
what it could keep where it finds that cheaper. This reads every array once and writes every result once, whatever lies
between.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 1024  # elements that a program of the kernel takes at once: 8 a thread

Function = Callable[[list[Array], Sequence[Any], list[Array]], tuple[Sequence[Array], Sequence[Array]]]


def one_pass(
    function: Function,
    scalars: Sequence[Array],
    arrays: Sequence[Array],
    dtypes: Sequence[Any],
    *,
    offset: Sequence[Array | int],
    sums: int = 0,
    aliases: dict[int, int] | None = None,
    interpret: bool = False,
) -> tuple[list[Array], list[Array]]:
    """The results of `function`, arrays like those that it takes, and sums over all elements.

    Args:
      function: (index, scalars, elements) → (results, what is summed up), of each element by itself. `index` is its
        place along each axis, uint32; of the scalars it reads numbers (`scalars[0][i]`).
      scalars: arrays [n].
      arrays: of one shape.
      dtypes: of the results.
      offset: added to the index along each axis, where the arrays are a part of larger ones.
      sums: how many sums there are, float32.
      aliases: of arrays whose memory a result takes, the number of that result.
      interpret: as plain JAX operations, on any device.
    """
    shape = arrays[0].shape
    rows = shape[0] if len(shape) > 2 else 1  # of an axis of layers, so that 32 bits count what is in a row
    columns = math.prod(shape) // rows
    blocks = pl.cdiv(columns, BLOCK)
    scalars = [jnp.stack([jnp.asarray(x, jnp.uint32) for x in offset]), *scalars]
    first = len(scalars)

    def kernel(*refs: Any) -> None:
        start, read, written = refs[0], refs[first : first + len(arrays)], refs[first + len(arrays) :]
        column = pl.program_id(0) * BLOCK + jax.lax.iota(jnp.int32, BLOCK)
        live = column < columns if columns % BLOCK else None
        row, rest = pl.program_id(1).astype(jnp.uint32), column.astype(jnp.uint32)
        index: list[Array] = []
        for axis in reversed(range(len(shape))):
            place = rest
            if len(shape) > 2 and axis == 0:
                place = row
            elif axis > (len(shape) > 2):
                place, rest = rest % jnp.uint32(shape[axis]), rest // jnp.uint32(shape[axis])
            index.insert(0, place + start[axis])
        elements = [triton.load(ref, mask=live, other=None if live is None else 0) for ref in read]
        results, summed = function(index, refs[1:first], elements)
        for ref, result in zip(written, results, strict=False):
            triton.store(ref, result.astype(ref.dtype), mask=live)
        for ref, value in zip(written[len(dtypes) :], summed, strict=True):
            ref[0] = jnp.sum(value if live is None else jnp.where(live, value, jnp.zeros_like(value)))

    part = pl.BlockSpec((None, BLOCK), lambda j, i: (i, j))
    whole = [pl.BlockSpec(x.shape, lambda j, i: (0,)) for x in scalars]
    out = pl.pallas_call(
        kernel,
        grid=(blocks, rows),
        in_specs=[*whole, *[part] * len(arrays)],
        out_specs=[part] * len(dtypes) + [pl.BlockSpec((None, 1), lambda j, i: (i, j))] * sums,
        out_shape=[jax.ShapeDtypeStruct((rows, columns), dtype) for dtype in dtypes]
        + [jax.ShapeDtypeStruct((rows, blocks), jnp.float32)] * sums,
        input_output_aliases={first + i: o for i, o in (aliases or {}).items()},
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(*scalars, *(x.reshape(rows, columns) for x in arrays))
    return [x.reshape(shape) for x in out[: len(dtypes)]], [jnp.sum(x) for x in out[len(dtypes) :]]
