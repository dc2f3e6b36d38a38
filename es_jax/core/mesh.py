"""The device mesh, and where the master weights live on it."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

POP, MODEL = "pop", "model"
_MIN_SLICE = 128  # numbers; a smaller leaf is kept whole on every device, where its own program stays the same


def make_mesh(pop: int | None = None, model: int = 1, *, devices: list | None = None) -> Mesh:
    """A `pop` × `model` mesh over the devices (all there are, by default). `pop=None` takes what `model` leaves.

    With a smaller `pop` the first devices are used. Raises ValueError when there are too few.

    >>> make_mesh(1, 1, devices=jax.devices()[:1]).axis_names
    ('pop', 'model')
    """
    devices = jax.devices() if devices is None else devices
    if model < 1 or (pop is not None and pop < 1):
        raise ValueError(f"mesh is pop={pop} × model={model}: both must be at least 1")
    pop = max(len(devices) // model, 1) if pop is None else pop
    if pop * model > len(devices):
        raise ValueError(
            f"mesh is pop={pop} × model={model}, but there are {len(devices)} devices: "
            f"set mesh.pop and mesh.model so that their product is at most {len(devices)}"
        )
    devices = devices[: pop * model]
    return jax.make_mesh((pop, model), (POP, MODEL), devices=devices, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_pop(mesh: Mesh) -> NamedSharding:
    """The leading axis is the group of devices that evaluates a member."""
    return NamedSharding(mesh, PartitionSpec(POP))


def leaf_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A master leaf, cut over every device along its last axis that divides; whole where no axis does."""
    n, size = mesh.size, math.prod(shape)
    for axis in reversed(range(len(shape))):
        if shape[axis] % n == 0 and size // n >= _MIN_SLICE:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, (POP, MODEL)))
    return replicated(mesh)


def param_shardings(mesh: Mesh, params: Any) -> Any:
    """`leaf_sharding` of every leaf of a tree of arrays or `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf_sharding(mesh, leaf.shape), params)
