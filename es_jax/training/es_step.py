"""The device side of a step: members' rewards in, new weights out. Everything here is compiled once."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from es_jax.core import processes
from es_jax.core.mesh import GROUPS, MODEL, leaf_spec, only, over_pop, own_rows, place, replicated
from es_jax.core.tree import map_named
from es_jax.es.noise import NOISES, GaussianNoise, SharedSeedNoise
from es_jax.es.population import Members
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import Prompts
from es_jax.models.sharding import RULES, param_shardings
from es_jax.optim.chains import build_optimizer
from es_jax.profiling.clock import launched
from es_jax.training.config import RunConfig
from es_jax.training.fields import ESConfig, OptimConfig

LANE = "lane"  # the axis of the members that a group evaluates at once


def make_noise(config: RunConfig) -> GaussianNoise:
    """The run's noise. Stacked layers count as the parameters they are made of."""
    if config.es.noise == "shared_seed":
        return SharedSeedNoise(config.es.generator, stacked="layers/")
    return NOISES[config.es.noise](config.es.generator)


def compute_dtype(config: RunConfig) -> jnp.dtype:
    """model.dtype, with "auto" resolved: bfloat16 on accelerators, float32 on CPU."""
    if config.model.dtype != "auto":
        return jnp.dtype(config.model.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def of_update(config: RunConfig) -> RunConfig:
    """The fields that `update` compiles in, all others at their defaults, so that runs of one process share it."""
    es = ESConfig(
        population=config.es.population, sigma=config.es.sigma, noise=config.es.noise, generator=config.es.generator
    )
    anchor = dataclasses.replace(config.optim.anchor, schedule="constant")
    return RunConfig(es=es, optim=dataclasses.replace(config.optim, schedule="constant", anchor=anchor))


def of_rated_update(config: RunConfig) -> RunConfig:
    """The same where `update` is given its rates: runs that differ in α, σ, λ, N or their schedules share a program."""
    anchored = config.optim.anchor.penalty != "none"
    anchor = dataclasses.replace(config.optim.anchor, strength=1.0 if anchored else None, kappa=None, source=None)
    anchor = dataclasses.replace(anchor, schedule="constant")
    optim = dataclasses.replace(config.optim, learning_rate=OptimConfig().learning_rate, schedule="constant")
    return RunConfig(
        es=ESConfig(noise=config.es.noise, generator=config.es.generator),
        optim=dataclasses.replace(optim, anchor=anchor),
    )


def optimizer(
    config: RunConfig, mesh: Mesh, params: Any, rates: Any = None
) -> tuple[optax.GradientTransformationExtraArgs, str]:
    """The run's transformation and its sentence; the anchor lives where optim.anchor.memory says."""
    memory = config.optim.anchor.memory
    if memory == "device":
        return build_optimizer(config, params, rates=rates)
    where = jax.tree.map(lambda s: s.with_memory_kind(memory), param_shardings(mesh, params))
    return build_optimizer(config, params, rates=rates, anchor_sharding=where)


def state_shardings(config: RunConfig, mesh: Mesh, opt_state: Any) -> Any:
    """Where the optimizer's state lives: cut like the parameters, the anchor in its own memory."""

    def where(name: str, sharding: NamedSharding) -> NamedSharding:
        memory = config.optim.anchor.memory if "anchor" in name.split("/") else "device"
        return sharding if memory == "device" else sharding.with_memory_kind(memory)

    return map_named(where, param_shardings(mesh, opt_state))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def update(
    config: RunConfig,
    mesh: Mesh,
    params: Any,
    opt_state: Any,
    base: Any,
    members: Members,
    weights: jax.Array,
    rates: jax.Array | None = None,
) -> tuple[Any, Any, jax.Array]:
    """One step of the weights: (params, opt_state, squares). Parameters and optimizer state are donated.

    `config`: of `of_update`.

    Every device makes all members' noise for its own slice, and nothing is sent or reduced: `squares` [groups, model]
    holds each device's part of ‖θ − θ₀‖², which `distance` adds up. θ₀ is `base`, or the anchor where `base` is None.
    `rates`: (α, αλ); by default the config's.
    """
    gradient = _gradient(config, mesh, params, members, weights)
    params, opt_state = stepped(config, mesh, params, opt_state, gradient, rates)
    return params, opt_state, _squares(mesh, param_shardings(mesh, params), params, start_of(mesh, opt_state, base))


@functools.partial(jax.jit, static_argnums=(0, 1))
def estimate_square(config: RunConfig, mesh: Mesh, params: Any, members: Members, weights: jax.Array) -> jax.Array:
    """The square of `update`'s estimate, which is made as there, and held nowhere: to time it."""
    leaves = jax.tree.leaves(_gradient(config, mesh, params, members, weights))
    return sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), jnp.zeros((), leaves[0].dtype))


def _gradient(config: RunConfig, mesh: Mesh, params: Any, members: Members, weights: jax.Array) -> Any:
    estimate = make_noise(config).estimate(params, members, weights)
    return jax.lax.with_sharding_constraint(estimate, param_shardings(mesh, params))


def stepped(
    config: RunConfig, mesh: Mesh, params: Any, opt_state: Any, gradient: Any, rates: jax.Array | None = None
) -> tuple[Any, Any]:
    """One step of the optimizer, everything left where it belongs; inside jit. `rates`: as of `update`."""
    rates = None if rates is None else rates.astype(jax.tree.leaves(gradient)[0].dtype)  # as a constant would be
    updates, opt_state = optimizer(config, mesh, params, rates)[0].update(gradient, opt_state, params)
    params = jax.lax.with_sharding_constraint(optax.apply_updates(params, updates), param_shardings(mesh, params))
    return params, jax.tree.map(_kept, opt_state, state_shardings(config, mesh, opt_state))


def start_of(mesh: Mesh, opt_state: Any, base: Any) -> Any:
    """θ₀ on the devices: `base`, or the optimizer's anchor where that is None; inside jit."""
    if base is not None:
        return base
    anchor = optax.tree_utils.tree_get(opt_state, "anchor")
    return jax.tree.map(jax.device_put, anchor, param_shardings(mesh, anchor))


def _kept(leaf: jax.Array, where: NamedSharding) -> jax.Array:
    """The leaf held where it belongs; one in host memory is what came in, and stays as it is."""
    return leaf if where.memory_kind == "pinned_host" else jax.lax.with_sharding_constraint(leaf, where)


def _squares(mesh: Mesh, where: Any, params: Any, base: Any) -> jax.Array:
    specs = jax.tree.map(lambda sharding: sharding.spec, where)

    def part(param: jax.Array, start: jax.Array, spec: PartitionSpec) -> jax.Array:
        total = jnp.sum(jnp.square(param.astype(jnp.float32) - start.astype(jnp.float32)))
        copies = [jax.lax.axis_index(axis) for axis in mesh.axis_names if axis not in spec]
        return jnp.where(sum(copies, jnp.int32(0)) == 0, total, 0.0)  # a leaf held several times counts once

    def local(params: Any, base: Any) -> jax.Array:
        return sum(jax.tree.leaves(jax.tree.map(part, params, base, specs)), jnp.float32(0))[None, None]

    out = PartitionSpec(*mesh.axis_names)
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, specs), out_specs=out, check_vma=False)(params, base)


@jax.jit
def distance(squares: jax.Array) -> jax.Array:
    """‖θ − θ₀‖, a scalar, from the parts of its square that `update` gives: the one sum over devices of a step."""
    return jnp.sqrt(jnp.sum(squares))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Perturbs and decodes members, a group of devices each, several at once where the model is small.

    A *lane* is one member with its own prompts; a call runs `lanes` of them. `perturb` makes the lanes' weights and
    `_decode` runs a queue of prompts through the slots of each.
    """

    engine: Engine
    mesh: Mesh
    noise: GaussianNoise
    sigma: float
    dtype: DTypeLike
    at_once: int

    @classmethod
    def of(cls, config: RunConfig, engine: Engine, mesh: Mesh) -> "Evaluator":
        """A run's. It holds no more of the config than its programs need, so that runs of one process share them.

        A group takes no more members at once than its share of the population, so that all groups have some.
        """
        noise, dtype = make_noise(config), compute_dtype(config)
        at_once = min(config.decode.members_at_once, -(-config.es.population // mesh.shape[GROUPS]))
        return cls(engine, mesh, noise=noise, sigma=config.es.sigma, dtype=dtype, at_once=at_once)

    @property
    def lanes(self) -> int:
        return self.mesh.shape[GROUPS] * self.at_once

    @property
    def apart(self) -> bool:
        """Whether a member's layers are made one by one, as the engine wants them, all by one small program.

        To make the stacked leaves and cut them up would write all weights twice.
        """
        return self.engine.unrolled and self.at_once == 1 and self.noise.rows_alone

    def perturb(self, params: Any, members: Members, old: Any = None) -> Any:
        """The weights of a round of members, in the engine's layout; where layers are made apart, in the memory of an
        `old` round's, which are gone then. Fresh memory costs a CPU as much as the noise."""
        if not self.apart:
            return self._perturb(params, members)
        rest, layers = {name: leaf for name, leaf in params.items() if name != "layers"}, {"layers": params["layers"]}
        count = len(jax.tree.leaves(layers)[0])
        spare = [None] * count if old is None else [{"layers": layer} for layer in old["layers"]]
        made = self._perturb(rest, members, None, None if old is None else {name: old[name] for name in rest})
        each = (self._perturb(layers, members, np.int32(i), spare[i])["layers"] for i in range(count))
        return {**made, "layers": tuple(each)}

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=4, keep_unused=True)
    def _perturb(self, params: Any, members: Members, layer: jax.Array | None = None, old: Any = None) -> Any:
        """All of it in one program; with `layer`, that layer alone, of params that are nothing but layers."""
        specs = map_named(lambda name, leaf: leaf_spec(self.mesh, name, leaf.shape, RULES), params)
        held = jax.tree.map(lambda spec: only(spec, GROUPS), specs)

        def one(params: Any, member: Members, layer: jax.Array | None) -> Any:
            made = map_named(functools.partial(self._made, member=member, layer=layer), params, specs)
            whole = layer is None and "layers" in params
            return self.engine.layout(made) if whole else self.engine.turned(made)

        in_specs = (held, PartitionSpec(GROUPS), PartitionSpec())
        return self._grouped(one, in_specs=in_specs, mapped=(None, 0, None))(params, members, layer)

    def _made(
        self, name: str, part: jax.Array, spec: PartitionSpec, member: Members, layer: jax.Array | None
    ) -> jax.Array:
        """A member's leaf, from its parts over `groups`: of one that is cut no more than a layer is gathered at once."""
        cut, size = only(spec, MODEL), self.mesh.shape[GROUPS]

        def made(part: jax.Array, row: tuple | None = None) -> jax.Array:
            whole = {name: _gathered(self.mesh, part, spec)}
            leaf = self.noise.apply(whole, member, sigma=self.sigma, dtype=self.dtype, row=row)[name]
            return jax.lax.with_sharding_constraint(leaf, cut)

        def alone(i: jax.Array) -> jax.Array:
            return made(jax.lax.dynamic_slice_in_dim(part, i, 1), (i, len(part)))

        if layer is not None:
            return alone(layer)[0]
        if size == 1 or GROUPS not in spec or not name.startswith("layers/") or not self.noise.rows_alone:
            return made(part)

        def stacked(i: jax.Array, stack: jax.Array) -> jax.Array:
            stack = jax.lax.dynamic_update_slice_in_dim(stack, alone(i), i, 0)
            return jax.lax.with_sharding_constraint(stack, cut)

        shape = [n * size if entry == GROUPS else n for n, entry in zip(part.shape, spec, strict=True)]
        return jax.lax.fori_loop(0, len(part), stacked, jnp.zeros(shape, self.dtype))

    @functools.partial(jax.jit, static_argnums=0)
    def _decode(self, params: Any, prompts: Prompts) -> Any:
        def one(params, tokens, positions, prefix):
            lane = LANE if self.at_once > 1 else None
            generation = self.engine.decode(params, tokens, positions, prefix=prefix, axis_name=lane)
            return generation.tokens, generation.length

        specs = (PartitionSpec(GROUPS),) * 3 + (PartitionSpec(),)
        return self._grouped(one, in_specs=specs, mapped=(0, 0, 0, None))(params, *prompts)

    def _grouped(self, one: Any, *, in_specs: tuple, mapped: tuple) -> Any:
        """`one` over lanes: shard_map over groups of devices, vmap over the lanes of a group."""

        def group(*args):
            if self.at_once > 1:
                return jax.vmap(one, in_axes=mapped, axis_name=LANE)(*args)
            args = (
                arg if axis is None else jax.tree.map(lambda x: x[0], arg)
                for arg, axis in zip(args, mapped, strict=True)
            )
            return jax.tree.map(lambda x: x[None], one(*args))

        return jax.shard_map(
            group,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=PartitionSpec(GROUPS),
            axis_names={GROUPS},
            check_vma=False,
        )

    def members(self, params: Any, members: Members, prompts: Prompts) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Every member on all prompts: (member, tokens [Q, L], length [Q]), graded while the next ones decode.
        In a run of several processes, those that this one's devices decode.

        A round is dispatched before the one before it is handed out, so the devices have work while the host grades.
        Where lanes are left over in the last round, their rows are padding and they decode nothing. The weights of one
        round are gone before those of the next are made, or give them their memory, except where members are small and
        run several at once.
        """
        count, perturbed = len(members), None
        pending: list = []
        for first in range(0, count, self.lanes):
            index = np.arange(first, first + self.lanes)
            lanes = members[np.minimum(index, count - 1)]
            if self.at_once == 1:  # a member's weights are large: those of the round before are to be gone
                processes.wait(functools.partial(jax.block_until_ready, [outputs for _, outputs in pending]))
            perturbed = launched("perturb", processes.launch(self.perturb, params, self._placed(lanes), perturbed))
            live = (index < count)[:, None, None]
            tokens = np.repeat(prompts.tokens[None], self.lanes, 0)
            rows = self._rows(tokens, np.where(live, prompts.positions[None], np.int32(-1)), prompts.prefix)
            pending.append((index[index < count], launched("decode", processes.launch(self._decode, perturbed, rows))))
            perturbed = perturbed if self.apart else None
            if len(pending) > 1:
                yield from _unpack(pending.pop(0))
        del perturbed
        for item in pending:
            yield from _unpack(item)

    def unperturbed(
        self, params: Any, queues: Iterable[Prompts]
    ) -> Iterator[dict[int, tuple[range, np.ndarray, np.ndarray]]]:
        """θ itself on several queues of prompts, each dealt out to the lanes: of each, lane → (rows, tokens, length).

        A queue is dispatched before the one before it is handed out, so the devices have work while the host grades; no
        more than two hold caches, since a CPU would run all that there are side by side. Queues of the same width and
        prefix share a program with one another, and with the members where these have as many prompts a lane. In a run
        of several processes, each has the lanes of its own devices.
        """
        queues, slots = list(queues), self.engine.slots
        if not queues:
            return
        nobody = Members(jnp.zeros(self.lanes, jnp.uint32), jnp.zeros(self.lanes, jnp.float32))
        weights, pending = processes.launch(self.perturb, params, self._placed(nobody)), []
        for prompts in queues:
            count, width = prompts.tokens.shape
            each = -(-count // (self.lanes * slots)) * slots
            tokens = np.zeros((self.lanes, each, width), np.int32)
            positions = np.full_like(tokens, -1)
            rows = [range(lane, count, self.lanes) for lane in range(min(self.lanes, count))]
            for lane, own in enumerate(rows):
                tokens[lane, : len(own)], positions[lane, : len(own)] = prompts.tokens[own], prompts.positions[own]
            made = processes.launch(self._decode, weights, self._rows(tokens, positions, prompts.prefix))
            pending.append((rows, made))
            if len(pending) > 1:
                yield _of_lanes(*pending.pop(0))
        del weights
        for item in pending:
            yield _of_lanes(*item)

    def _rows(self, tokens: np.ndarray, positions: np.ndarray, prefix: np.ndarray) -> Prompts:
        tokens, positions = self._placed((tokens, positions))
        return Prompts(tokens, positions, place(prefix, replicated(self.mesh)))

    def _placed(self, tree: Any) -> Any:
        return place(tree, over_pop(self.mesh))


def _gathered(mesh: Mesh, part: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The leaf from its parts over `groups`, each device its own cut over `model`; inside a shard_map over `groups`."""
    if GROUPS not in spec or mesh.shape[GROUPS] == 1:
        return part
    gather = functools.partial(jax.lax.all_gather, axis_name=GROUPS, axis=list(spec).index(GROUPS), tiled=True)
    cut = only(spec, MODEL)  # by hand: the partitioner would gather over `model` too
    return jax.shard_map(gather, in_specs=cut, out_specs=cut, axis_names={MODEL}, check_vma=False)(part)


def _unpack(item: tuple) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    members, outputs = item
    tokens, length = processes.wait(lambda: [own_rows(output) for output in outputs])
    for lane, member in enumerate(members):
        if lane in tokens:
            yield int(member), tokens[lane], length[lane]


def _of_lanes(rows: list[range], outputs: Any) -> dict[int, tuple[range, np.ndarray, np.ndarray]]:
    """Lane → (rows, tokens, length) of a queue that was dealt out to the lanes."""
    return {lane: (rows[lane], tokens, length) for lane, tokens, length in _unpack((range(len(rows)), outputs))}


def placed_weights(mesh: Mesh, members: Members, weights: np.ndarray) -> tuple[Members, jax.Array]:
    """Members and weights on every device, always from the host, so that live steps and replays are one program."""
    return place((members, np.asarray(weights, np.float32)), replicated(mesh))
