"""The device mesh, and the rules by which leaves of the weights are sharded over it."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

GROUPS, MODEL = "groups", "model"
Rules = Sequence[tuple[str, PartitionSpec]]  # a pattern searched for in the leaf's name, and the leaf's sharding

_MIN_SLICE = 128  # numbers per device; for a finer slice XLA makes scalar code, whose last bits differ


def require_32_bits() -> None:
    """Raises ValueError if JAX uses 64-bit types: with them a run would have other bits than its seed log."""
    if jax.config.read("jax_enable_x64"):
        raise ValueError("JAX_ENABLE_X64 is on, but runs and decoding use 32-bit integers and floats: unset it")


def make_mesh(groups: int | None = None, model: int = 1, *, devices: list | None = None) -> Mesh:
    """A `groups` × `model` mesh over the devices (all by default). `groups=None` is as many groups as `model` allows.

    A group is the `model` devices that share one member. They are neighbours, on one host and on one slice if they fit.
    With a smaller `groups` only the first devices are used, which needs all devices to belong to one process.

    Raises ValueError if there are too few devices, if a run of several processes would leave devices out, or if
    JAX_ENABLE_X64 is on.

    >>> make_mesh(1, 1, devices=jax.devices()[:1]).axis_names
    ('groups', 'model')
    """
    require_32_bits()
    devices = list(jax.devices() if devices is None else devices)
    if model < 1 or (groups is not None and groups < 1):
        raise ValueError(f"mesh is groups={groups} × model={model}: both must be at least 1")
    groups = max(len(devices) // model, 1) if groups is None else groups
    if groups * model > len(devices):
        raise ValueError(
            f"mesh is groups={groups} × model={model}, but there are {len(devices)} devices: "
            f"set mesh.groups and mesh.model so that their product is at most {len(devices)}"
        )
    if groups * model < len(devices) and len({d.process_index for d in devices}) > 1:
        raise ValueError(
            f"mesh is groups={groups} × model={model}, but there are {len(devices)} devices on several hosts and all "
            f"must be used: set mesh.groups and mesh.model so that their product is {len(devices)}"
        )
    used = devices[: groups * model]
    slices = len({getattr(d, "slice_index", 0) for d in used})
    if slices > 1 and groups % slices == 0:  # slow links join slices: only `groups` crosses them
        shape, across = (groups // slices, model), (slices, 1)
        grid = mesh_utils.create_hybrid_device_mesh(shape, across, used, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh((groups, model), used, allow_split_physical_axes=True)
    return Mesh(grid, (GROUPS, MODEL), axis_types=(AxisType.Auto,) * 2)


def platform_of(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu": the platform of the devices, whether they are present or only compiled for."""
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_groups(mesh: Mesh) -> NamedSharding:
    """A sharding of the leading axis over the groups of devices."""
    return NamedSharding(mesh, PartitionSpec(GROUPS))


def to_devices(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host arrays, equal in all processes, on the devices of the mesh; each process fills its own devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def leaf(x: Any) -> jax.Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(leaf, tree)


def own_rows(leaf: jax.Array) -> dict[int, np.ndarray]:
    """The rows of the leading axis that this process holds, by index; a row that several hold belongs to the first."""
    if leaf.is_fully_addressable:
        return dict(enumerate(np.asarray(leaf)))
    rows: dict[int, np.ndarray] = {}
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            rows |= zip(range(leaf.shape[0])[shard.index[0]], np.asarray(shard.data), strict=True)
    return rows


def leaf_spec(mesh: Mesh, name: str, shape: tuple[int, ...], rules: Rules) -> PartitionSpec:
    """The sharding of a leaf, by the first rule whose pattern is found in its name.

    A leaf with fewer than 128 numbers per device is not sharded over `groups`. Raises ValueError, which names the leaf,
    if no rule matches, the rule has too many axes, or an axis does not divide.
    """
    spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f"leaf {name!r} has no sharding rule: add one for it to the table")
    if len(spec) > len(shape):
        raise ValueError(
            f"leaf {name!r} of shape {shape} has the sharding rule {spec}, which has too many axes: correct the rule"
        )
    parts = {None: 1, **mesh.shape}
    if math.prod(shape) // math.prod(parts[entry] for entry in spec) < _MIN_SLICE:
        spec = only(spec, MODEL)
    for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        if size % parts[entry]:
            raise ValueError(
                f"leaf {name!r} of shape {shape}: axis {axis} of {size} does not divide over "
                f"mesh.{entry} = {parts[entry]}; set mesh.{entry} to a divisor of {size}"
            )
    return spec


def only(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """The same sharding, restricted to one axis of the mesh."""
    return PartitionSpec(*(entry if entry == axis else None for entry in spec))


def offset_of(spec: PartitionSpec, shape: tuple[int, ...]) -> list[jax.Array | int]:
    """The start of a device's shard along each axis, for an array with that sharding; inside a `shard_map`."""
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    return [0 if axis is None else jax.lax.axis_index(axis) * n for axis, n in zip(entries, shape, strict=True)]
