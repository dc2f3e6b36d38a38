"""The weights of a run and the program that updates them: the same in training, on resuming and in a replay."""

import dataclasses
import functools
import itertools
import math
import timeit
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, PartitionSpec

from es_jax.core import processes, rng
from es_jax.core.chips import GIB
from es_jax.core.mesh import make_mesh, platform_of, replicated, to_devices
from es_jax.core.tree import map_named, named_leaves
from es_jax.es.low_rank import LowRankNoise
from es_jax.es.noise import NOISES, GaussianNoise, SharedSeedNoise
from es_jax.es.population import Members
from es_jax.models.config import TransformerConfig
from es_jax.models.sharding import check_heads, leaf_sharding, members_spread, param_shardings
from es_jax.models.transformer import param_shapes
from es_jax.optim.chains import Chain, describe
from es_jax.profiling.clock import timed
from es_jax.rundir.checkpoints import abstract
from es_jax.rundir.places import shape_source
from es_jax.rundir.seed_log import Entry
from es_jax.training.config import Rates, RunConfig
from es_jax.training.one_pass_update import takes_one_pass, update_in_one_pass
from es_jax.weights.chat_template import set_date
from es_jax.weights.model import Model, config_only, load_model


def make_noise(config: RunConfig, streams: int = rng.STREAMS) -> GaussianNoise:
    """The noise of a run whose random streams have that version."""
    es, old = config.es, config.es.antithetic and streams < 3
    if es.noise == "shared_seed":
        return SharedSeedNoise(es.generator, old, stacked="layers/")
    if es.noise == "low_rank":
        return LowRankNoise(es.generator, old, rank=es.rank, vectors=es.vectors, stacked="layers/")
    return NOISES[es.noise](es.generator, old)


def perturbed_count(config: RunConfig, params: Any) -> int:
    """d in the closed forms of drift: how many weights get noise; all of them for a method without noise."""
    noise = make_noise(config) if config.record.perturbs else GaussianNoise()
    return sum(leaf.size for name, leaf in named_leaves(params) if noise.perturbs(name, leaf))


def compute_dtype(config: RunConfig) -> jnp.dtype:
    """model.dtype, with "auto" resolved: bfloat16 on accelerators, float32 on CPU."""
    if config.model.dtype != "auto":
        return jnp.dtype(config.model.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def choose_mesh(
    config: RunConfig,
    model: TransformerConfig,
    *,
    devices: list | None = None,
    memory: int | None = None,
    before: int | None = None,
) -> tuple[Mesh, str]:
    """The mesh of a run, and why: sizes that the config leaves open are chosen from the devices and the model's size.

    `devices` are all devices by default; `memory` is the bytes of one, by default as reported; `before` is how many
    devices shared a member when the run began. Raises ValueError for sizes that the devices or the model's heads do not
    allow.
    """
    devices = jax.devices() if devices is None else devices
    spread, why = config.mesh.model, "set by mesh.model"
    if spread is None:
        size = compute_dtype(config).itemsize * sum(map(math.prod, param_shapes(model).values()))
        memory = processes.device_memory() if memory is None else memory
        room = len(devices) // (config.mesh.groups or 1)
        spread = members_spread(model, room, member_bytes=size, memory=memory)
        if memory is None:
            why = "the devices do not report their memory"
        else:
            share, more = (
                ("at most", "") if 3 * size <= memory * spread else ("more than", ", but no more can share it")
            )
            room_of = f"{spread} × {memory / GIB:.3g} GiB"
            why = f"a member's weights take {size / GIB:.3g} GiB, {share} a third of {room_of}{more}"
        if before is not None and before > spread and room % before == 0:
            spread, why = before, "as many devices share a member as when the run began"
    check_heads(model, spread)
    mesh = make_mesh(config.mesh.groups, spread, devices=devices)
    sizes = " × ".join(f"{axis} {mesh.shape[axis]}" for axis in mesh.axis_names)
    return mesh, f"mesh: {sizes} of {len(devices)} devices: {why}"


def mesh_of(config: RunConfig, model: TransformerConfig, **options: Any) -> Mesh:
    """The mesh of `choose_mesh`."""
    return choose_mesh(config, model, **options)[0]


def base_config(config: RunConfig) -> TransformerConfig:
    """The shape of the run's base model; model.source may be a step of a run. Raises ValueError if model.source is
    empty or cannot be read."""
    if not config.model.source:
        raise ValueError("model.source is empty: set it to a Hugging Face folder, a .gguf file or a hub name")
    return config_only(shape_source(config.model.source))


def load_base(config: RunConfig, mesh: Mesh, *, source: str | None = None) -> Model:
    """The base model of a run, or another `source`, in model.param_dtype and sharded over all devices of the mesh."""
    model = load_model(
        config.model.source if source is None else source,
        mesh=mesh,
        dtype=jnp.dtype(config.model.param_dtype),
        shardings=lambda name, shape: leaf_sharding(mesh, name, shape),
    )
    set_date(model.tokenizer, config.model.template_date)
    return model


def load_anchor(config: RunConfig, mesh: Mesh, params: Any) -> Any:
    """The weights of optim.anchor.source, sharded like the run's; raises ValueError if the shapes differ."""
    source = config.optim.anchor.source
    anchor = load_base(config, mesh, source=source).params
    if jax.tree.map(jnp.shape, anchor) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"optim.anchor.source {source!r} has other parameters than model.source: give a model of the same shape"
        )
    return anchor


def anchor_offset(config: RunConfig, anchor: Any, params: Any) -> float:
    """‖anchor − θ₀‖ over the weights that get noise; the others do not move."""
    noise, squares = make_noise(config), jax.tree.map(_square, anchor, params)
    moving = [noise.perturbs(name, leaf) for name, leaf in named_leaves(params)]
    return math.sqrt(sum(float(x) for x in itertools.compress(jax.tree.leaves(squares), moving)))


def chain_of(config: RunConfig) -> Chain:
    """The optimizer of a run, without its rates."""
    optim, anchor = config.optim, config.optim.anchor
    return Chain.of(
        optim.name,
        vars(optim),
        max_grad_norm=optim.max_grad_norm,
        penalty=anchor.penalty,
        # The published code computes everything in the weights' dtype.
        arithmetic="param" if config.es.noise == "shared_seed" else "float32",
        ema_decay=anchor.ema_decay,
        memory=anchor.memory,
    )


def optimizer_sentence(config: RunConfig) -> str:
    """One sentence on the optimizer of a run."""
    optim, anchor = config.optim, config.optim.anchor
    return describe(
        chain_of(config),
        learning_rate=optim.learning_rate,
        strength=config.anchor_strength,
        kappa=config.anchor_kappa,
        schedules=(optim.schedule, anchor.schedule),
        source=anchor.source,
    )


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """All that the program `update` depends on besides shapes and the mesh; runs that differ only in α, σ or λ share
    it."""

    noise: GaussianNoise
    chain: Chain

    @classmethod
    def of(cls, config: RunConfig, streams: int = rng.STREAMS) -> "UpdateSpec":
        return cls(make_noise(config, streams), chain_of(config))


def update(
    spec: UpdateSpec,
    mesh: Mesh,
    params: Any,
    opt_state: Any,
    start: Any,
    members: Members,
    weights: Array,
    rates: Array,
) -> tuple[Any, Any, Array]:
    """One step of the weights: (params, opt_state, squares). Parameters and optimizer state are donated.

    Leaves without noise stay unchanged, whatever the optimizer's own decay or an anchor elsewhere would do. Every
    device makes all members' noise for its own slice, and nothing is sent except for max_grad_norm. `squares` [groups,
    model] holds each device's part of ‖θ − θ₀‖², which `distance` sums. θ₀ is `start`, or the anchor if that is None.
    `rates` are (α, αλ) of the step.
    """
    if (platform := platform_of(mesh)) != "cpu" and takes_one_pass(spec.noise, spec.chain):
        return update_in_one_pass(
            spec.noise, spec.chain, mesh, params, opt_state, start, members, weights, rates, platform=platform
        )
    gradient = _gradient(spec.noise, mesh, params, members, weights)
    moved, opt_state = optimizer_step(spec.chain, mesh, params, opt_state, gradient, rates)
    params = map_named(lambda name, old, new: new if spec.noise.perturbs(name, old) else old, params, moved)
    return params, opt_state, _squares(mesh, params, theta0_of(mesh, opt_state, start))


# The CPU backend schedules for parallelism, and would hold the estimates of all leaves at once.
_LEAF_BY_LEAF = (
    {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.__version_info__ >= (0, 10)
    else {"xla_cpu_enable_concurrency_optimized_scheduler": False}
)
_update, _update_on_cpu = (
    jax.jit(update, static_argnums=(0, 1), donate_argnums=(2, 3), compiler_options=options)
    for options in (None, _LEAF_BY_LEAF)
)


def update_on(mesh: Mesh) -> Any:
    """`update`, jitted for the devices of the mesh."""
    return _update_on_cpu if platform_of(mesh) == "cpu" else _update


def _gradient(noise: GaussianNoise, mesh: Mesh, params: Any, members: Members, weights: Array) -> Any:
    where = param_shardings(mesh, params)
    if not isinstance(noise, LowRankNoise):
        return with_sharding_constraint(noise.estimate(params, members, weights), where)
    shapes, specs = jax.eval_shape(lambda: params), jax.tree.map(lambda sharding: sharding.spec, where)
    own = functools.partial(noise.estimate, shapes, specs=specs)
    everywhere = PartitionSpec()
    return jax.shard_map(own, mesh=mesh, in_specs=(everywhere, everywhere), out_specs=specs, check_vma=False)(
        members, weights
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def estimate_square(*arguments: Any) -> Array:
    """The squared norm of `update`'s estimate, computed as there but not stored; it serves to time the estimate."""
    return optax.tree.norm(_gradient(*arguments), squared=True)


def optimizer_step(
    chain: Chain, mesh: Mesh, params: Any, opt_state: Any, gradient: Any, rates: Array
) -> tuple[Any, Any]:
    """One step of the optimizer, with all shardings kept; inside jit. `rates` are as in `update`."""
    tx = transformation(chain, mesh, params, rates.astype(jax.tree.leaves(gradient)[0].dtype))
    updates, opt_state = tx.update(gradient, opt_state, params)
    params = with_sharding_constraint(optax.apply_updates(params, updates), param_shardings(mesh, params))

    def stays(leaf, where):  # an anchor in host memory is the input, unchanged
        return leaf if where.memory_kind == "pinned_host" else with_sharding_constraint(leaf, where)

    return params, jax.tree.map(stays, opt_state, state_shardings(chain, mesh, opt_state))


def transformation(
    chain: Chain, mesh: Mesh, params: Any, rates: Any = (0.0, 0.0)
) -> optax.GradientTransformationExtraArgs:
    """The chain, with its anchor in `chain.memory`; `init` does not depend on the rates."""
    if chain.memory == "device":
        return chain.transformation(rates)
    where = jax.tree.map(lambda s: s.with_memory_kind(chain.memory), param_shardings(mesh, params))
    return chain.transformation(rates, where)


def state_shardings(chain: Chain, mesh: Mesh, opt_state: Any) -> Any:
    """The sharding of the optimizer's state: like the parameters, with the anchor in its own memory."""

    def where(name, sharding):
        pinned = chain.memory != "device" and "anchor" in name.split("/")
        return sharding.with_memory_kind(chain.memory) if pinned else sharding

    return map_named(where, param_shardings(mesh, opt_state))


def theta0_of(mesh: Mesh, opt_state: Any, start: Any) -> Any:
    """θ₀ on the devices: `start`, or the optimizer's anchor if that is None; inside jit."""
    if start is not None:
        return start
    anchor = optax.tree.get(opt_state, "anchor")
    return jax.tree.map(jax.device_put, anchor, param_shardings(mesh, anchor))


def _squares(mesh: Mesh, params: Any, start: Any) -> Array:
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(mesh, params))

    def part(param, start, spec):
        copies = [jax.lax.axis_index(axis) for axis in mesh.axis_names if axis not in spec]
        # a replicated leaf counts once
        return jnp.where(sum(copies, jnp.int32(0)) == 0, _square(param, start), 0.0)

    def local(params, start):
        return sum(jax.tree.leaves(jax.tree.map(part, params, start, specs)), jnp.float32(0))[None, None]

    out = PartitionSpec(*mesh.axis_names)
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, specs), out_specs=out, check_vma=False)(params, start)


@jax.jit
def distance(squares: Array) -> Array:
    """‖θ − θ₀‖, a scalar, from the parts of its square that `update` returns: the only sum over devices in a step."""
    return jnp.sqrt(jnp.sum(squares))


@jax.jit
def _square(a: Array, b: Array) -> Array:
    return jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))


def check_finite(params: Any, whose: str, remedy: str) -> None:
    """Raises ValueError, "`whose` weights … : `remedy`", which names the leaves, if weights are NaN, infinite, or so
    large that their squares are infinite. All processes call it. It reads all weights, so no step of a run calls it."""
    squares = named_leaves(processes.fetch(_own_squares(params)))
    if names := [name for name, square in squares if not np.isfinite(square)]:
        more = f" and {len(names) - 3} others" if len(names) > 3 else ""
        raise ValueError(
            f"{whose} weights are NaN, infinite or too large to be squared in {', '.join(names[:3])}{more}: {remedy}"
        )


@jax.jit
def _own_squares(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf.astype(jnp.float32))), params)


class State:
    """Weights θ and optimizer state. Only `apply`, `advance` and `restore` change them.

    Each change donates `params` and `opt_state`, so keep no reference across it. `drift` is ‖θ − θ₀‖ after the last
    step, `offset` is that of `anchor_offset`, `sentence` describes the optimizer, and `streams` is the version of the
    run's random streams.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, params: Any, streams: int = rng.STREAMS):
        if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
            raise ValueError("jax_threefry_partitionable is off, which changes the noise: unset it and start again")
        check_memory(config, mesh)
        self._config, self._mesh, self.params = config, mesh, params
        self.spec, self.sentence = UpdateSpec.of(config, streams), optimizer_sentence(config)
        self._start, chain = None if anchor_stays(config) else jax.tree.map(jnp.copy, params), self.spec.chain
        tx = transformation(chain, mesh, params)
        where = state_shardings(chain, mesh, jax.eval_shape(tx.init, params))
        self.opt_state = jax.jit(tx.init, out_shardings=where)(params)
        self.drift: Array | float = 0.0
        self.offset = 0.0
        if config.optim.anchor.source is not None:
            other = load_anchor(config, mesh, params)
            self.offset = anchor_offset(config, other, params)
            anchors = jax.tree.map(lambda leaf: leaf.sharding, optax.tree.get(self.opt_state, "anchor"))
            self.opt_state = optax.tree.set(self.opt_state, anchor=jax.device_put(other, anchors))

    @property
    def base(self) -> Any:
        """θ₀: a separate copy, or the optimizer's anchor."""
        return optax.tree.get(self.opt_state, "anchor") if self._start is None else self._start

    def apply(self, entry: Entry) -> None:
        """Make the entry's step by `update`, from the weights of the step before, as in every run and replay of ES."""
        self.params, self.opt_state, squares = update_on(self._mesh)(*self.update_arguments(entry))
        self.drift = distance(timed("update", squares))

    def advance(self, program: Callable[..., tuple], *arguments: Any) -> Any:
        """Make a step by another program: (params, opt_state, θ₀ or None as in `update`, *arguments) → (params,
        opt_state, drift, what `advance` returns). It may donate the first two."""
        self.params, self.opt_state, self.drift, rest = program(self.params, self.opt_state, self._start, *arguments)
        return rest

    def restore(self, read: Callable[[Any, Any], tuple[Any, Any]]) -> None:
        """Take weights and optimizer state from `read`, which is called with their shapes after the old ones are
        freed."""
        like = abstract((self.params, self.opt_state))
        self.params = self.opt_state = None
        self.params, self.opt_state = read(*like)

    def update_arguments(self, entry: Entry) -> tuple:
        """The arguments of `update` for a step of the seed log."""
        members, weights = self._on_devices(entry)
        rates = self.rates(self._config.logged_rates(entry))
        return self.spec, self._mesh, self.params, self.opt_state, self._start, members, weights, rates

    def rates(self, rates: Rates) -> Array:
        """(α, αλ) of a step, replicated over the devices."""
        pair = np.array([rates.learning_rate, rates.learning_rate * rates.strength], np.float32)
        return to_devices(pair, replicated(self._mesh))

    def estimate_seconds(self, entry: Entry) -> float:
        """Seconds that the estimate of a step takes alone: the best of three, after a first call that compiles it."""
        arguments = (self.spec.noise, self._mesh, self.params, *self._on_devices(entry))
        compute = functools.partial(processes.wait, lambda: jax.block_until_ready(estimate_square(*arguments)))
        return min(timeit.repeat(compute, number=1, repeat=4)[1:])

    def _on_devices(self, entry: Entry) -> tuple[Members, Array]:
        """Members and weights, replicated over the devices and always from the host, so that live steps and replays run
        one program."""
        return to_devices((entry.members, np.array(entry.weights, np.float32)), replicated(self._mesh))


def anchor_stays(config: RunConfig) -> bool:
    """Whether the optimizer's anchor is θ₀ throughout the run, so that θ₀ needs no separate copy."""
    anchor = config.optim.anchor
    return anchor.penalty != "none" and anchor.ema_decay is None and anchor.source is None


def check_memory(config: RunConfig, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of the mesh have the memory kind that optim.anchor.memory names."""
    wanted, device = config.optim.anchor.memory, mesh.local_devices[0]
    known = [memory.kind for memory in device.addressable_memories()]
    if wanted not in ("device", *known):
        raise ValueError(
            f"optim.anchor.memory is {wanted!r}, but {device.device_kind} has only {', '.join(known)}: set it to "
            "'device'"
        )
