"""Applies a function to every element of an array and its index, in one pass over memory: Pallas kernels for GPUs and
TPUs.

XLA has no loops inside a kernel, so a sum over many iterations goes through memory in each of them. It also writes
intermediate values to memory where it estimates that to be cheaper. These kernels read every array once and write every
result once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from es_jax.core.chunked_map import ceil_div

GPU, TPU = "gpu", "tpu"
BLOCK = 1024  # elements per program of the kernel on a GPU: 8 per thread
TILE = 16, 256  # the same on a TPU, for the last two axes: values of 4 registers

Function = Callable[[list[Array], Sequence[Any], list[Array]], tuple[Sequence[Array], Sequence[Array]]]


def one_pass(
    function: Function,
    scalars: Sequence[Array],
    arrays: Sequence[Array],
    dtypes: Sequence[Any],
    *,
    offset: Sequence[Array | int],
    platform: str,
    sums: int = 0,
    aliases: dict[int, int] | None = None,
    interpret: bool = False,
) -> tuple[list[Array], list[Array]]:
    """The results of `function`, arrays of the same shape as its inputs, and sums over all elements.

    Args:
      function: (index, scalars, elements) → (results, summands), elementwise. `index` is the position along each axis,
        uint32; it reads single numbers of the scalars (`scalars[0][i]`).
      scalars: arrays [n].
      arrays: of one shape.
      dtypes: the dtypes of the results.
      offset: added to the index along each axis if the arrays are a part of larger ones.
      platform: the platform of the kernel, GPU or TPU.
      sums: the number of sums, in float32.
      aliases: for each array whose memory a result reuses, the number of that result.
      interpret: run as plain JAX operations, on any device.
    """
    scalars = [jnp.stack([jnp.asarray(x, jnp.uint32) for x in offset]), *scalars]
    call = functools.partial(
        _on_gpu if platform == GPU else _on_tpu, function, scalars, arrays, dtypes, sums, interpret=interpret,
        input_output_aliases={len(scalars) + i: result for i, result in (aliases or {}).items()},
    )  # fmt: skip
    results, summed = call()
    return results, [jnp.sum(x) for x in summed]


def _on_gpu(
    function: Function, scalars: Any, arrays: Any, dtypes: Any, sums: int, *, interpret: bool, **options: Any
) -> tuple[list[Array], list[Array]]:
    """Views an array as rows of columns; the first axis gives the rows if it is the layers. 32 bits index a row."""
    from jax.experimental.pallas import triton

    shape, first = arrays[0].shape, len(scalars)
    layers = len(shape) > 2
    rows = shape[0] if layers else 1
    columns = math.prod(shape) // rows

    def kernel(*refs: Any) -> None:
        start, read, written = refs[0], refs[first : first + len(arrays)], refs[first + len(arrays) :]
        column = pl.program_id(0) * BLOCK + jax.lax.iota(jnp.int32, BLOCK)
        live = column < columns if columns % BLOCK else None
        places, rest = [], column.astype(jnp.uint32)
        for size in shape[:layers:-1]:
            places.append(rest % jnp.uint32(size))
            rest = rest // jnp.uint32(size)
        places += [rest, pl.program_id(1).astype(jnp.uint32)] if layers else [rest]
        index = [place + start[axis] for axis, place in enumerate(reversed(places))]
        elements = [triton.load(ref, mask=live, other=None if live is None else 0) for ref in read]
        results, summed = function(index, refs[1:first], elements)
        for ref, result in zip(written, results, strict=False):
            triton.store(ref, result.astype(ref.dtype), mask=live)
        for ref, value in zip(written[len(dtypes) :], summed, strict=True):
            ref[0] = jnp.sum(value if live is None else jnp.where(live, value, 0.0))

    part, blocks = pl.BlockSpec((None, BLOCK), lambda j, i: (i, j)), ceil_div(columns, BLOCK)
    out = pl.pallas_call(
        kernel,
        grid=(blocks, rows),
        in_specs=[*(pl.BlockSpec(x.shape, lambda j, i: (0,)) for x in scalars), *[part] * len(arrays)],
        out_specs=[part] * len(dtypes) + [pl.BlockSpec((None, 1), lambda j, i: (i, j))] * sums,
        out_shape=[jax.ShapeDtypeStruct((rows, columns), dtype) for dtype in dtypes]
        + [jax.ShapeDtypeStruct((rows, blocks), jnp.float32)] * sums,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4),
        interpret=interpret,
        **options,
    )(*scalars, *(x.reshape(rows, columns) for x in arrays))
    return [x.reshape(shape) for x in out[: len(dtypes)]], list(out[len(dtypes) :])


def _on_tpu(
    function: Function, scalars: Any, arrays: Any, dtypes: Any, sums: int, *, interpret: bool, **options: Any
) -> tuple[list[Array], list[Array]]:
    """Views an array as layers of matrices. They are transposed where XLA stores them so, which it does if that leaves
    less padding in tiles."""
    from jax.experimental.pallas import tpu

    shape, first = arrays[0].shape, len(scalars)
    layers, rows, columns = (1,) * (3 - len(shape)) + shape
    turned = _tiles(columns, rows) < _tiles(rows, columns)
    if turned:
        rows, columns = columns, rows
    block = min(rows, TILE[0]), min(columns, TILE[1])
    whole = rows % block[0] == 0 and columns % block[1] == 0

    def kernel(*refs: Any) -> None:
        start, read, written = refs[0], refs[first : first + len(arrays)], refs[first + len(arrays) :]
        row, column = (
            pl.program_id(1 + axis) * size + jax.lax.broadcasted_iota(jnp.int32, block, axis)
            for axis, size in enumerate(block)
        )
        own = [pl.program_id(0), *((column, row) if turned else (row, column))][3 - len(shape) :]
        index = [place.astype(jnp.uint32) + start[axis] for axis, place in enumerate(own)]
        results, summed = function(index, refs[1:first], [ref[...] for ref in read])
        for ref, result in zip(written, results, strict=False):
            ref[...] = result.astype(ref.dtype)
        for ref, value in zip(written[len(dtypes) :], summed, strict=True):
            value = value if whole else jnp.where((row < rows) & (column < columns), value, 0.0)
            begins = functools.reduce(jnp.logical_and, [pl.program_id(axis) == 0 for axis in range(3)])
            ref[...] = value + jnp.where(begins, 0.0, ref[...])  # blocks run in sequence

    def view(x: Array) -> Array:
        x = x.reshape((1,) * (3 - x.ndim) + x.shape)
        return x.swapaxes(1, 2) if turned else x

    part = pl.BlockSpec((None, *block), lambda i, j, k: (i, j, k))
    out = pl.pallas_call(
        kernel,
        grid=(layers, ceil_div(rows, block[0]), ceil_div(columns, block[1])),
        in_specs=[pl.BlockSpec(memory_space=tpu.SMEM)] * first + [part] * len(arrays),
        out_specs=[part] * len(dtypes) + [pl.BlockSpec(block, lambda i, j, k: (0, 0))] * sums,
        out_shape=[jax.ShapeDtypeStruct((layers, rows, columns), dtype) for dtype in dtypes]
        + [jax.ShapeDtypeStruct(block, jnp.float32)] * sums,
        interpret=interpret,
        **options,
    )(*scalars, *map(view, arrays))
    return [(x.swapaxes(1, 2) if turned else x).reshape(shape) for x in out[: len(dtypes)]], list(out[len(dtypes) :])


def _tiles(rows: int, columns: int) -> int:
    """The bytes of a float32 matrix in a TPU's memory."""
    return ceil_div(rows, 8) * ceil_div(columns, 128)
