"""The programs of a run, lowered for devices that are not here: they are asked for from the run's own classes.

`load` makes the optimizer's state (the anchor in it), `perturb` a round of members, `decode` their completions,
`update` is the estimate and the step. With low-rank noise `share` makes the one copy of the weights that all members
have, and `perturb` what each has of its own. Arrays have shapes and shardings, but no numbers.
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
    """Bytes of arrays on one device, and of its share in the host's pinned memory."""

    device: int = 0
    host: int = 0

    @classmethod
    def of(cls, tree: Any) -> "Bytes":
        """Of a tree of `jax.ShapeDtypeStruct`s with shardings."""
        sizes = [0, 0]
        for leaf in jax.tree.leaves(tree):
            pinned = leaf.sharding.memory_kind == "pinned_host"
            sizes[pinned] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        return cls(*sizes)


class Counted(NamedTuple):
    """A part of a program whose bytes are counted, and what they must be at least on one device."""

    least: float
    scope: str | None = None  # one turn of the outermost loop in it; None: a run of the program
    turns: Mapping[str, float] = MappingProxyType({})  # in the place of the program's
    branches: Mapping[str, int] = MappingProxyType({})  # as `traffic.TrafficCounter` takes them, like the next
    kernels: Kernels = MappingProxyType({})


class Program(NamedTuple):
    """One program of an iteration; the names are those of `Programs`' methods."""

    name: str
    lower: Callable[[], Any]  # for the topology
    times: int  # that an iteration runs it; 0 for "load"
    parts: Mapping[str, Bytes]  # what the device holds while it runs
    own: Set[str]  # the parts that the compiler's figures contain; the others are the run's
    work: Work  # of one device in a run of it, without what is sent
    turns: Mapping[str, float] = MappingProxyType({})  # as `hlo.collectives` takes them
    counted: Mapping[str, Counted] = MappingProxyType({})  # "" for the whole program, else by the name of the part


class Programs:
    """A run's programs on a mesh of devices to compile for; config.model.dtype must not be "auto".

    Where the config leaves decode.slots and decode.members_at_once open they are chosen as a run does, from the
    `memory` of a device (by default, of one that is here).
    """

    # The methods that give them; not all have all.
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
        in_place = platform_of(mesh) == "gpu" and decode_attention.supports(model)  # as `Engine` chooses there
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
        evaluator = self.evaluator = Evaluator.of(config, engine, mesh)
        self.rounds = ceil_div(config.es.population, evaluator.lanes)  # of members in an iteration
        self.members = _members(evaluator.lanes, over_groups(mesh))
        noise, dtype = evaluator.noise, jnp.dtype(evaluator.dtype)
        copy = jax.eval_shape(evaluator.shared_weights, self.params) if evaluator.shared else self.params
        size = sum(leaf.size for leaf in jax.tree.leaves(copy)) * dtype.itemsize // mesh.shape[MODEL]
        own = self.copy = {"compute copy": Bytes(size if evaluator.shared else evaluator.at_once * size)}
        self.pairs: dict[str, Bytes] = {}
        if isinstance(noise, LowRankNoise):
            own = self.pairs = {"pairs": Bytes(evaluator.at_once * pair_bytes(noise, model, dtype))}
        # A round is dispatched while the one before it decodes, but for large members.
        self.other_round = {"other round": next(iter(own.values()))} if evaluator.vmapped and self.rounds > 1 else {}
        self.rates = array((2,), jnp.float32, self.everywhere)  # (α, αλ) of a step
        anchor, moments = self.start, self.opt_state
        if anchor is None:
            anchor, moments = optax.tree.get(moments, "anchor"), optax.tree.set(moments, anchor=None)
        held = {"parameters": self.params, "anchor": anchor, "moments": moments}
        self.resident = {name: Bytes.of(tree) for name, tree in held.items()}  # at any time
        self._check_memory()

    def _check_memory(self) -> None:
        """Raises ValueError where the devices to compile for do not know the anchor's memory, as JAX's absent GPUs."""
        anchor = self.config.optim.anchor
        if anchor.penalty != "none" and anchor.memory != "device" and not self.resident["anchor"].host:
            raise ValueError(
                f"optim.anchor.memory is {anchor.memory!r}, which JAX does not know of GPUs that are not here: plan "
                "with 'device', and take the anchor's bytes off those of a device"
            )

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """What `decode` takes, by the program that makes it; where it lies is known when that is compiled."""
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
        """From the weights, which are read leaf by leaf, to the optimizer's state."""
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
        """The copy of the weights that all members share, whole in every group."""
        return Program(
            "share",
            lambda: Evaluator.shared_weights.lower(self.evaluator, self.params),
            times=1,
            parts=self.resident | self.copy,
            own={"parameters", *self.copy},
            work=Work(memory=self.resident["parameters"].device + self.copy["compute copy"].device),
        )

    def perturb(self) -> Program:
        """The weights of one round of members; where all share one copy, what each has of its own; where layers are
        made one by one, all but these."""
        if self.evaluator.layer_by_layer:
            return self._perturbed("perturb", self._rest_and_layers[0], None, times=self.rounds)
        if not self.pairs:
            return self._perturbed("perturb", self.params, None, times=self.rounds)
        moved = sum(part.device for part in self.pairs.values())  # the shapes of shared weights alone are needed
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
        """One layer of one round of members."""
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
        """Prefill and completions of one round of members, a slotful of prompts at a time, with `weights` placed where
        the compiled programs leave them."""
        evaluator, where = self.evaluator, over_groups(self.mesh)
        tokens = array((evaluator.lanes, self.each, self.width), jnp.int32, where)
        rows = Prompts(tokens, tokens, array((0,), jnp.int32, self.everywhere))  # no shared prefix: a bound

        def lower() -> Any:
            weights: Any = tuple(self.weights.values())
            if evaluator.layer_by_layer:
                rest, layer = weights
                weights = {**rest, "layers": (layer["layers"],) * self.model.layers}
            elif not evaluator.shared:
                (weights,) = weights
            return Evaluator._decode.lower(evaluator, weights, rows)

        program = self._completions(
            "decode", lower, prompts=self.each, times=self.rounds, lanes=evaluator.at_once, rank=self._rank,
        )  # fmt: skip
        parts = {**program.parts, **self.pairs, **self.other_round}
        return program._replace(parts=parts, own={*program.own, *self.pairs})

    @property
    def _rank(self) -> int:
        """Of the members' pairs; 0 where they have none."""
        return self.evaluator.noise.rank if isinstance(self.evaluator.noise, LowRankNoise) else 0

    def _completions(
        self, name: str, lower: Callable[[], Any], *, prompts: int, times: int, lanes: int = 1, rank: int = 0,
        own: Set[str] = frozenset(),
    ) -> Program:  # fmt: skip
        """A program that completes so many prompts on each of a group's lanes; with a `rank` these share one copy of
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
        """Of a decode step with all slots at their last place, of one whose slots' lengths are spread evenly from there
        down to the first new token, of a chunk of steps beside these, and of a prefill: each weight that they use is
        read once, and each lane's live keys and values; those of new tokens are written, and where a chunk has its own
        cache read and written once more after it. The chunk is the last that is compiled: of all slots, at all places.
        """
        model, share = self.model, self.mesh.shape[MODEL]
        weights = sum(math.prod(shape) for shape in param_shapes(model).values())
        weights -= 0 if model.tied_embeddings else model.width * model.vocab_size  # rows of it are looked up
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
        """Estimate and step. Of low-rank noise a pass over a leaf, read and written, adds a block of members."""
        n, antithetic = self.config.es.population, self.config.es.antithetic
        members = dataclasses.replace(_members(n, self.everywhere), paired=antithetic)
        arguments = self.start, members, array((n,), jnp.float32, self.everywhere), self.rates
        total = sum(sum(part) for part in self.resident.values())
        passes = ceil_div(n // 2 if antithetic else n, BLOCK) if self._rank else 0
        parameters, anchor, moments = (self.resident[name].device for name in ("parameters", "anchor", "moments"))
        least = 2.0 * (parameters + moments) + anchor
        if self.start is not None and self.config.optim.anchor.ema_decay is None:  # an anchor that stays is read only
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
    """A shape in the place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _members(n: int, sharding: Any) -> Members:
    return Members(array((n,), jnp.uint32, sharding), array((n,), jnp.float32, sharding))


def placed(tree: Any, shardings: Any) -> Any:
    """A tree of shapes, at those places."""
    return jax.tree.map(lambda leaf, where: array(leaf.shape, leaf.dtype, where), tree, shardings)


def find_shape(config: RunConfig) -> tuple[TransformerConfig, str]:
    """The shape of a run's base model, and where it was found: "files" (a folder with a config.json, a .gguf, the hub
    or its cache), or "published" (`es_jax.models.known_configs`) where a hub name cannot be had."""
    try:
        return state.base_config(config), "files"
    except (FileNotFoundError, PermissionError) as error:
        if known := published(config.model.source):
            return known, "published"
        raise type(error)(f"{error}; shapes known without it: {', '.join(PUBLISHED)}") from error


def programs_of(config: RunConfig, model: TransformerConfig, topology: Topology) -> Programs:
    """A run's programs, on the mesh that it asks for; model.dtype "auto" is bfloat16, as on any accelerator."""
    if config.model.dtype == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    mesh = state.mesh_of(config, model, devices=list(topology.devices), memory=topology.chip.memory)
    return pkgutil.resolve_name(METHODS[config.method].programs)(config, model, mesh, topology.chip.memory)
