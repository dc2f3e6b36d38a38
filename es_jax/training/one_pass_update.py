"""`update` on GPUs and TPUs: one kernel per leaf makes the estimate, takes the step and pulls toward the anchor.

θ and the optimizer's state are read once and written once; a fixed anchor, which the step does not change, is only
read.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from es_jax.core.mesh import offset_of
from es_jax.core.one_pass import one_pass
from es_jax.core.tree import named_leaves
from es_jax.es.noise import GaussianNoise
from es_jax.es.population import Members
from es_jax.models.sharding import param_shardings
from es_jax.optim.chains import Chain

_PARAMS, _START = -1, -2  # in addition to the numbered parts of the optimizer's state


def takes_one_pass(noise: GaussianNoise, chain: Chain) -> bool:
    """Whether the update is elementwise; it is not if the gradient is clipped by its norm."""
    return noise.elementwise and chain.max_grad_norm is None


def update_in_one_pass(
    noise: GaussianNoise,
    chain: Chain,
    mesh: Mesh,
    params: Any,
    opt_state: Any,
    start: Any,
    members: Members,
    weights: Array,
    rates: Array,
    *,
    platform: str,
    interpret: bool = False,
) -> tuple[Any, Any, Array]:
    """What `update` returns for the same arguments; inside jit. `platform` and `interpret` are as in `one_pass`."""
    like: Any = jax.tree.structure(params)
    leaves = named_leaves(params)
    specs = [sharding.spec for sharding in jax.tree.leaves(param_shardings(mesh, params))]
    parts, structure = jax.tree.flatten(opt_state, is_leaf=lambda part: jax.tree.structure(part) == like)
    trees = {i: part for i, part in enumerate(parts) if jax.tree.structure(part) == like}
    numbers = {i: part for i, part in enumerate(parts) if i not in trees}
    step = _elementwise(chain, structure)
    kinds = {i: _some(jax.tree.leaves(tree)[0]) for i, tree in trees.items()}
    of_one: Any = jax.make_jaxpr(step)(_some(weights), _some(leaves[0][1]), kinds, numbers, (rates[0], rates[1])).jaxpr
    changes = zip([_PARAMS, *trees], of_one.invars[1:], of_one.outvars, strict=False)
    own = {i: new.aval.dtype for i, old, new in changes if old is not new}  # moments may become wider

    columns = {_PARAMS: params, **trees} | ({} if start is None else {_START: start})
    if chain.memory != "device":
        columns = {i: jax.device_put(tree, param_shardings(mesh, tree)) for i, tree in columns.items()}
    lists = {i: jax.tree.leaves(tree) for i, tree in columns.items()}
    anchored = optax.tree.get(opt_state, "anchor")
    origin = _START if start is not None else next(i for i, tree in trees.items() if tree is anchored)
    scalars = [*noise.summands(members, weights), rates, *(number.reshape(1) for number in numbers.values())]
    over = functools.partial(
        _over_leaf, noise, step, tuple(trees), tuple(numbers), own, origin, platform=platform, interpret=interpret
    )

    def local(scalars: Any, lists: Any) -> tuple[Any, Array]:
        results, squares = [], jnp.float32(0)
        for k, ((name, leaf), spec) in enumerate(zip(leaves, specs, strict=True)):
            result, square = over(name, leaf.shape, spec, scalars, {i: column[k] for i, column in lists.items()})
            results.append(result)
            copies = [jax.lax.axis_index(axis) for axis in mesh.axis_names if axis not in spec]
            squares += jnp.where(sum(copies, jnp.int32(0)) == 0, square, 0.0)  # a leaf that is replicated counts once
        return {i: [result[i] for result in results] for i in own}, squares[None, None]

    moved, squares = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), {i: specs for i in lists}),
        out_specs=({i: specs for i in own}, PartitionSpec(*mesh.axis_names)), check_vma=False,
    )(scalars, lists)  # fmt: skip
    moved = {i: jax.tree.unflatten(like, column) for i, column in moved.items()}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (_some(weights), _some(leaves[0][1]), kinds))
    state = trees | step(*zeros, numbers, (rates[0], rates[1]))[2] | {i: moved[i] for i in own}
    return moved[_PARAMS], jax.tree.unflatten(structure, [state[i] for i in range(len(parts))]), squares


def _over_leaf(
    noise: GaussianNoise, step: Callable, trees: Sequence[int], numbers: Sequence[int], own: dict[int, Any],
    origin: int, name: str, shape: tuple[int, ...], spec: PartitionSpec, scalars: Sequence[Array],
    arrays: dict[int, Array], **options: Any,
) -> tuple[dict[int, Array], Array]:  # fmt: skip
    """A device's part of one leaf: those of `arrays` that the step changes, named with their dtypes in `own`; and the
    squared distance from `origin`."""

    def elements(index: list[Array], scalars: Sequence[Any], values: list[Array]) -> tuple[list[Array], list[Array]]:
        (seeds, signed, pair, *rest), at = scalars, dict(zip(arrays, values, strict=True))
        gradient = noise.estimate_at(name, shape, index, seeds, signed)
        counts = {i: x[0] for i, x in zip(numbers, rest, strict=True)}
        param, state, _ = step(gradient, at[_PARAMS], {i: at[i] for i in trees}, counts, (pair[0], pair[1]))
        far = param.astype(jnp.float32) - (at | state)[origin].astype(jnp.float32)
        new = state | {_PARAMS: param}
        return [new[i] for i in own], [jnp.square(far)]

    results, (square,) = one_pass(
        elements, scalars, [*arrays.values()], list(own.values()), sums=1,
        offset=offset_of(spec, arrays[_PARAMS].shape),
        aliases={list(arrays).index(i): result for result, i in enumerate(own) if arrays[i].dtype == own[i]}, **options,
    )  # fmt: skip
    return dict(zip(own, results, strict=True)), square


def _some(leaf: Any) -> jax.ShapeDtypeStruct:
    """Abstract elements of a leaf, to find what a step makes of them."""
    return jax.ShapeDtypeStruct((1,), leaf.dtype)


def _elementwise(chain: Chain, structure: Any) -> Callable:
    """The optimizer's step on some elements of a leaf: (gradient, parameter, state, numbers, rates) → (parameter,
    state, numbers). `state` and `numbers` are parts of the optimizer's state, by their position in it."""
    chain = dataclasses.replace(chain, memory="device")

    def step(gradient: Array, param: Array, state: dict, numbers: dict, rates: Any) -> tuple[Array, dict, dict]:
        parts = {i: [x] for i, x in state.items()} | numbers
        tree = jax.tree.unflatten(structure, [parts[i] for i in range(len(parts))])
        updates, tree = chain.transformation(rates).update([gradient], tree, [param])
        new = structure.flatten_up_to(tree)
        return optax.apply_updates([param], updates)[0], {i: new[i][0] for i in state}, {i: new[i] for i in numbers}

    return step
