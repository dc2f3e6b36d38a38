"""The programs of a run, lowered for absent devices; they come from the run's own classes.

`load` makes the optimizer's state including the anchor, `perturb` a round of members, `decode` their completions, and
`update` the estimate and the step. With low-rank noise `share` makes the one copy of the weights that all members
share, and `perturb` what each member adds. Arrays have shapes and shardings but no data.
"""

import dataclasses
import functools
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Set
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from es_jax.core import rng
from es_jax.core.chunked_map import ceil_div
from es_jax.core.mesh import MODEL, over_groups, platform_of, replicated
from es_jax.es.low_rank import BLOCK, LowRankNoise
from es_jax.es.population import Members
from es_jax.generate.decode_spec import FILL, PART, STEPS, LoopSizes
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import Prompts, padded_width
from es_jax.models import decode_attention
from es_jax.models.config import TransformerConfig
from es_jax.models.known_configs import PUBLISHED, published
from es_jax.models.sharding import param_shardings
from es_jax.models.transformer import Transformer, matrix_weights, param_shapes, without_layers
from es_jax.planning.costs import Work, cache_bytes, decode_memory, forward_flops, pair_numbers
from es_jax.planning.topology import Topology
from es_jax.planning.traffic import Kernels
from es_jax.training import state
from es_jax.training.config import RunConfig
from es_jax.training.es import Evaluator
from es_jax.training.method import METHODS
from es_jax.training.sizes import choose_slots, members_at_once, pair_bytes, prompts_of_member


class Bytes(NamedTuple):
    """Bytes of arrays on one device, and in its share of the host's pinned memory."""

    device: int = 0
    host: int = 0

    @classmethod
    def of(cls, tree: Any) -> "Bytes":
        """The bytes of a tree of `jax.ShapeDtypeStruct`s with shardings."""
        sizes = [0, 0]
        for leaf in jax.tree.leaves(tree):
            pinned = leaf.sharding.memory_kind == "pinned_host"
            sizes[pinned] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        return cls(*sizes)


class Counted(NamedTuple):
    """A part of a program whose bytes are counted, and the least bytes on one device."""

    least: float
    scope: str | None = None  # scope: counts one iteration of its outermost loop; None: a run of the program
    turns: Mapping[str, float] = MappingProxyType({})  # replaces that of the program
    branches: Mapping[str, int] = MappingProxyType({})  # as in `traffic.TrafficCounter`, like the next
    kernels: Kernels = MappingProxyType({})


class Program(NamedTuple):
    """One program of an iteration; its name is that of the method of `Programs`."""

    name: str
    lower: Callable[[], Any]  # lowered for the topology
    times: int  # runs per iteration; 0 for "load"
    parts: Mapping[str, Bytes]  # what the device holds while it runs
    own: Set[str]  # parts within the compiler's figures; the others belong to the run
    work: Work  # work of one device in a run, without traffic
    turns: Mapping[str, float] = MappingProxyType({})  # as in `hlo.collectives`
    counted: Mapping[str, Counted] = MappingProxyType({})  # "" for the whole program, else the name of the part


class Programs:
    """A run's programs on a mesh of devices to compile for. config.model.dtype must not be "auto".

    If decode.slots and decode.members_at_once are not set, they are chosen as in a run, from the `memory` of a device
    (by default that of a present one).
    """

    # The methods that return them; not every method of training has all.
    order: tuple[str, ...] = ("load", "share", "perturb", "perturb_layer", "decode", "update")

    def __init__(self, config: RunConfig, model: TransformerConfig, mesh: Mesh, memory: int | None = None):
        self.model, self.mesh, self.everywhere = model, mesh, replicated(mesh)
        params = jax.eval_shape(lambda: Transformer(model).init(rng.key(0), dtype=config.model.param_dtype))
        self.params = placed(params, param_shardings(mesh, params))
        self.spec = state.UpdateSpec.of(config)
        self.tx = state.transformation(self.spec.chain, mesh, self.params)
        opt_state = jax.eval_shape(self.tx.init, self.params)
        self.opt_state = placed(opt_state, state.state_shardings(self.spec.chain, mesh, opt_state))
        self.start = None if state.anchor_stays(config) else self.params
        self.prompts = config.task.prompts_per_step or config.task.train_size
        self.each = prompts_of_member(config)
        longest, self.new = config.decode.max_prompt_tokens, config.decode.max_new_tokens
        self.width = padded_width(longest, longest)
        in_place = platform_of(mesh) == "gpu" and decode_attention.supports(model)  # as `Engine` would choose there
        engine = Engine(
            model, slots=self.each, max_prompt_tokens=longest, max_new_tokens=self.new, stop_token_ids=(0,),
            unroll=in_place, in_place=in_place,
        )  # fmt: skip
        slots = config.decode.slots or choose_slots(config, engine, mesh, memory=memory)[0]
        config = dataclasses.replace(config, decode=dataclasses.replace(config.decode, slots=slots))
        engine = dataclasses.replace(engine, slots=min(slots, self.each))
        if config.decode.members_at_once is None:
            number = members_at_once(config, engine, mesh, memory=memory)
            config = dataclasses.replace(config, decode=dataclasses.replace(config.decode, members_at_once=number))
        self.config = config
        evaluator = self.evaluator = Evaluator.of(config, engine, mesh).sampling(config.decode.temperature)
        self.rounds = ceil_div(config.es.population, evaluator.lanes)  # rounds of members in an iteration
        self.members = _members(evaluator.lanes, over_groups(mesh))
        noise, dtype = evaluator.noise, jnp.dtype(evaluator.dtype)
        copy = jax.eval_shape(evaluator.shared_weights, self.params) if evaluator.shared else self.params
        size = sum(leaf.size for leaf in jax.tree.leaves(copy)) * dtype.itemsize // mesh.shape[MODEL]
        own = self.copy = {"compute copy": Bytes(size if evaluator.shared else evaluator.at_once * size)}
        self.pairs: dict[str, Bytes] = {}
        if isinstance(noise, LowRankNoise):
            own = self.pairs = {"pairs": Bytes(evaluator.at_once * pair_bytes(noise, model, dtype))}
        # A round is dispatched while the previous one decodes, except with large members.
        self.other_round = {"other round": next(iter(own.values()))} if evaluator.vmapped and self.rounds > 1 else {}
        self.rates = array((2,), jnp.float32, self.everywhere)  # (α, αλ) of a step
        anchor, moments = self.start, self.opt_state
        if anchor is None:
            anchor, moments = optax.tree.get(moments, "anchor"), optax.tree.set(moments, anchor=None)
        held = {"parameters": self.params, "anchor": anchor, "moments": moments}
        self.resident = {name: Bytes.of(tree) for name, tree in held.items()}  # at any time
        self._check_memory()

    def _check_memory(self) -> None:
        """Raises ValueError if the devices to compile for do not have the anchor's memory kind, such as JAX's absent
        GPUs."""
        anchor = self.config.optim.anchor
        if anchor.penalty != "none" and anchor.memory != "device" and not self.resident["anchor"].host:
            raise ValueError(
                f"optim.anchor.memory is {anchor.memory!r}, which JAX does not support for absent GPUs: plan with "
                "'device', and subtract the anchor's bytes from those of a device"
            )

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """The inputs of `decode` by the program that makes them; their shardings are known once that is compiled."""
        evaluator = self.evaluator
        if evaluator.layer_by_layer:
            rest, layers = self._rest_and_layers
            layer = functools.partial(evaluator._perturb, layer=np.int32(0))
            return {
                "perturb": jax.eval_shape(evaluator._perturb, rest, self.members),
                "perturb_layer": jax.eval_shape(layer, layers, self.members),
            }
        if not evaluator.shared:
            return {"perturb": jax.eval_shape(evaluator._perturb, self.params, self.members)}
        pairs = jax.eval_shape(evaluator.member_pairs, self.params, self.members)
        return {"share": jax.eval_shape(evaluator.shared_weights, self.params), "perturb": pairs}

    @property
    def _rest_and_layers(self) -> tuple[Any, Any]:
        return without_layers(self.params), {"layers": self.params["layers"]}

    def __iter__(self) -> Iterator[Program]:
        absent = {"share"} if not self.evaluator.shared else set()
        absent |= {"perturb_layer"} if not self.evaluator.layer_by_layer else set()
        return (getattr(self, name)() for name in self.order if name not in absent)

    def load(self) -> Program:
        """Makes the optimizer's state from the weights, which are read leaf by leaf."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.opt_state)
        return Program(
            "load",
            lambda: jax.jit(self.tx.init, out_shardings=where, keep_unused=True).lower(self.params),
            times=0,
            parts=self.resident,
            own=self.resident.keys() if self.start is None else {"parameters", "moments"},
            work=Work(memory=2.0 * sum(part.device for part in self.resident.values())),
        )

    def share(self) -> Program:
        """Makes the copy of the weights that all members share, replicated over the groups."""
        return Program(
            "share",
            lambda: Evaluator.shared_weights.lower(self.evaluator, self.params),
            times=1,
            parts=self.resident | self.copy,
            own={"parameters", *self.copy},
            work=Work(memory=self.resident["parameters"].device + self.copy["compute copy"].device),
        )

    def perturb(self) -> Program:
        """Makes the weights of one round of members. If all share one copy, it makes what each member adds; if layers
        are made one by one, everything except the layers."""
        if self.evaluator.layer_by_layer:
            return self._perturbed("perturb", self._rest_and_layers[0], None, times=self.rounds)
        if not self.pairs:
            return self._perturbed("perturb", self.params, None, times=self.rounds)
        moved = sum(part.device for part in self.pairs.values())  # only the shapes of shared weights are needed
        return Program(
            "perturb",
            lambda: Evaluator.member_pairs.lower(self.evaluator, self.params, self.members),
            times=self.rounds,
            parts=self.resident | self.copy | self.pairs | self.other_round,
            own=self.pairs.keys(),
            work=Work(memory=moved),
            counted={"": Counted(moved)},
        )

    def perturb_layer(self) -> Program:
        """Makes one layer of one round of members."""
        layers = self._rest_and_layers[1]
        layer = array((), jnp.int32, self.everywhere)
        return self._perturbed("perturb_layer", layers, layer, times=self.rounds * self.model.layers)

    def _perturbed(self, name: str, params: Any, layer: Any, *, times: int) -> Program:
        """The members' weights of these leaves, or of one layer of them."""
        part = 1 if layer is None else self.model.layers
        read = Bytes.of(params).device // part
        size = sum(leaf.size for leaf in jax.tree.leaves(params)) // part // self.mesh.shape[MODEL]
        moved = read + self.evaluator.at_once * size * jnp.dtype(self.evaluator.dtype).itemsize
        return Program(
            name,
            lambda: Evaluator._perturb.lower(self.evaluator, params, self.members, layer),
            times=times,
            parts=self.resident | self.copy | self.other_round,
            own={"parameters", *self.copy},
            work=Work(memory=moved),
            counted={"": Counted(moved)},
        )

    def decode(self) -> Program:
        """Prefill and completions of one round of members, with all slots filled at a time, and with `weights` sharded
        as the compiled programs leave them."""
        evaluator, where = self.evaluator, over_groups(self.mesh)
        tokens = array((evaluator.lanes, self.each, self.width), jnp.int32, where)
        rows = Prompts(tokens, tokens, array((0,), jnp.int32, self.everywhere))  # no shared prefix, so a bound
        sampled = bool(self.config.decode.temperature)
        keys = array((evaluator.lanes, self.each, 2), jnp.uint32, where) if sampled else None

        def lower() -> Any:
            weights: Any = tuple(self.weights.values())
            if evaluator.layer_by_layer:
                rest, layer = weights
                weights = {**rest, "layers": (layer["layers"],) * self.model.layers}
            elif not evaluator.shared:
                (weights,) = weights
            return Evaluator._decode.lower(evaluator, weights, rows, keys)

        program = self._completions(
            "decode", lower, prompts=self.each, times=self.rounds, lanes=evaluator.at_once, rank=self._rank,
        )  # fmt: skip
        parts = {**program.parts, **self.pairs, **self.other_round}
        return program._replace(parts=parts, own={*program.own, *self.pairs})

    @property
    def _rank(self) -> int:
        """The rank of the members' pairs; 0 without pairs."""
        return self.evaluator.noise.rank if isinstance(self.evaluator.noise, LowRankNoise) else 0

    def _completions(
        self, name: str, lower: Callable[[], Any], *, prompts: int, times: int, lanes: int = 1, rank: int = 0,
        own: Set[str] = frozenset(),
    ) -> Program:  # fmt: skip
        """A program that completes so many prompts on each lane of a group. With a `rank` the lanes share one copy of
        the weights, which a step reads once."""
        new, share = self.new, self.mesh.shape[MODEL]
        sizes = LoopSizes.of(self.evaluator.engine, prompts, self.width, lanes=lanes)
        itemsize = jnp.dtype(self.config.model.dtype).itemsize
        cache = Bytes(lanes * cache_bytes(self.model, sizes.slots * sizes.places, itemsize) // share)
        flops = forward_flops(self.model, prompts, self.width + new - 1, logits=new, rank=rank)  # the last is not fed
        engine = self.evaluator.engine
        passes = int(sizes.turns[PART]) * (lanes // engine.parted(lanes, prompts, self.width))  # of a prefill
        steps = ceil_div(prompts, sizes.slots) * (passes + new - 1)
        copy = sum(matrix_weights(self.model)) * itemsize
        read = copy / lanes + 4 * rank * sum(pair_numbers(self.model)) if rank else copy  # for one lane
        memory = decode_memory(self.model, prompts, self.width, new, steps=steps, copy=read, itemsize=itemsize)
        return Program(
            name,
            lower,
            times=times,
            parts=self.resident | self.copy | {"KV cache": cache},
            own={*self.copy, "KV cache", *own},
            work=Work(flops * lanes / share, memory * lanes / share),
            turns=sizes.turns,
            counted=self._least(sizes, lanes, itemsize),
        )

    def _least(self, sizes: LoopSizes, lanes: int, itemsize: int) -> dict[str, Counted]:
        """The counted parts: a decode step with all slots at their last place, a step whose slots' lengths are spread
        evenly from there down to the first new token, the rest of a chunk of steps, and a prefill. The least traffic
        reads each used weight once and each lane's live keys and values, and writes those of new tokens. If a chunk has
        its own cache, that is read and written once more after it. The chunk is the last compiled one: all slots, at
        all places.
        """
        model, share = self.model, self.mesh.shape[MODEL]
        weights = sum(math.prod(shape) for shape in param_shapes(model).values())
        weights -= 0 if model.tied_embeddings else model.width * model.vocab_size  # only some of its rows are read
        copies = 1 if self.evaluator.shared else lanes
        read = copies * weights * itemsize / share + sum(part.device for part in self.pairs.values())
        places = self.width + self.new - 1
        lengths = {"step": [places], "even_step": np.linspace(self.width, places, sizes.slots).astype(int).tolist()}
        step, chunk, fill = (
            lanes * cache_bytes(model, tokens, itemsize)
            for tokens in (sizes.slots, sizes.slots * sizes.steps, sizes.fill_rows * sizes.width)
        )
        last, counted = {"": -1}, {}
        for name, length in lengths.items():
            live = np.mean([decode_memory(model, sizes.slots, n - 1, 2, steps=0, copy=0, itemsize=1) for n in length])
            kernels = {decode_attention.NAME: functools.partial(decode_attention.bytes_moved, lengths=length)}
            moved = read + (lanes * itemsize * float(live) + step) / share
            counted[name] = Counted(moved, STEPS, branches=last, kernels=kernels)
        if sizes.single:
            return counted | {"prefill": Counted(read + fill / share, turns={STEPS: 0})}
        if not sizes.in_place:
            counted["chunk"] = Counted(2 * chunk / share, "", turns={STEPS: 0, FILL: 0}, branches=last)
        return counted | {"prefill": Counted(read + fill / share, FILL)}

    def update(self) -> Program:
        """Estimate and step. With low-rank noise each pass over a leaf reads and writes it, and adds a block of
        members."""
        n, antithetic = self.config.es.population, self.config.es.antithetic
        members = dataclasses.replace(_members(n, self.everywhere), paired=antithetic)
        arguments = self.start, members, array((n,), jnp.float32, self.everywhere), self.rates
        total = sum(sum(part) for part in self.resident.values())
        passes = ceil_div(n // 2 if antithetic else n, BLOCK) if self._rank else 0
        parameters, anchor, moments = (self.resident[name].device for name in ("parameters", "anchor", "moments"))
        least = 2.0 * (parameters + moments) + anchor
        if self.start is not None and self.config.optim.anchor.ema_decay is None:  # a fixed anchor is only read
            least -= Bytes.of(optax.tree.get(self.opt_state, "anchor")).device
        return Program(
            "update",
            lambda: state.update_on(self.mesh).lower(self.spec, self.mesh, self.params, self.opt_state, *arguments),
            times=1,
            parts=self.resident,
            own=self.resident.keys(),
            work=Work(memory=total + (1 + 2.0 * passes) * self.resident["parameters"].device),
            turns={"": passes or n},
            counted={"": Counted(least)},
        )


def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """A shape that stands for an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _members(n: int, sharding: Any) -> Members:
    return Members(array((n,), jnp.uint32, sharding), array((n,), jnp.float32, sharding))


def placed(tree: Any, shardings: Any) -> Any:
    """A tree of shapes with those shardings."""
    return jax.tree.map(lambda leaf, where: array(leaf.shape, leaf.dtype, where), tree, shardings)


def find_shape(config: RunConfig) -> tuple[TransformerConfig, str]:
    """The shape of a run's base model, and where it was found: "files" (a folder with a config.json, a .gguf file, the
    hub or its cache), or "published" (`es_jax.models.known_configs`) if the hub cannot provide the name."""
    try:
        return state.base_config(config), "files"
    except (FileNotFoundError, PermissionError) as error:
        if known := published(config.model.source):
            return known, "published"
        raise type(error)(f"{error}; shapes that are known without the hub: {', '.join(PUBLISHED)}") from error


def programs_of(config: RunConfig, model: TransformerConfig, topology: Topology) -> Programs:
    """A run's programs on the mesh that it asks for; model.dtype "auto" becomes bfloat16, as on any accelerator."""
    if config.model.dtype == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    mesh = state.mesh_of(config, model, devices=list(topology.devices), memory=topology.chip.memory)
    return pkgutil.resolve_name(METHODS[config.method].programs)(config, model, mesh, topology.chip.memory)
