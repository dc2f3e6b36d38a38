"""The programs of a run, lowered for devices that are not here: they are asked for from the run's own classes.

`load` makes the optimizer's state (the anchor in it), `perturb` a round of members, `decode` their completions,
`update` is the estimate and the step. Arrays have shapes and shardings, but no numbers.
"""

import dataclasses
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from es_jax.core import rng
from es_jax.core.chunked_map import ceil_div
from es_jax.core.mesh import MODEL, over_pop, replicated
from es_jax.es.population import Members
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import WIDTH_STEP, Prompts
from es_jax.generate.slots import Queue
from es_jax.models.config import TransformerConfig
from es_jax.models.known_configs import PUBLISHED, published
from es_jax.models.sharding import param_shardings
from es_jax.models.transformer import Transformer, matrix_weights
from es_jax.planning.costs import Work, cache_bytes, decode_flops, decode_memory, prefill_flops
from es_jax.planning.topology import Topology
from es_jax.training.config import RunConfig
from es_jax.training.es import Evaluator
from es_jax.training.method import METHODS
from es_jax.training.state import (
    UpdateSpec,
    anchor_stays,
    base_config,
    mesh_of,
    state_shardings,
    transformation,
    update,
)


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of arrays on one device, and of its share in the host's pinned memory."""

    device: int = 0
    host: int = 0

    @classmethod
    def of(cls, tree: Any) -> "Held":
        """Of a tree of `jax.ShapeDtypeStruct`s with shardings."""
        device = host = 0
        for leaf in jax.tree.leaves(tree):
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            pinned = leaf.sharding.memory_kind == "pinned_host"
            device, host = (device, host + size) if pinned else (device + size, host)
        return cls(device, host)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of an iteration.

    Attributes:
      name: "load", "perturb", "decode" or "update".
      lower: lowers it for the topology.
      times: how often an iteration runs it; 0 for "load".
      turns: of its loops, as `es_jax.planning.hlo.collectives` takes them.
      parts: what the device holds while it runs, by name: of these `own` are the program's arguments, results and
        temporaries, and the others are the run's.
      own: names of parts that the compiler's figures contain.
      work: of a run of it, on one device, without what is sent.
    """

    name: str
    lower: Callable[[], Any]
    times: int
    turns: Mapping[str, float]
    parts: Mapping[str, Held]
    own: frozenset[str]
    work: Work


class Programs:
    """A run's programs on a mesh.

    Args:
      config: of the run; model.dtype must not be "auto".
      model: the model's shape.
      mesh: of the devices to compile for.
    """

    def __init__(self, config: RunConfig, model: TransformerConfig, mesh: Mesh):
        self.config, self.model, self.mesh = config, model, mesh
        params = jax.eval_shape(Transformer(model).init, rng.key(0))
        dtype = jnp.dtype(config.model.param_dtype)
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
        self.params = _placed(params, param_shardings(mesh, params))
        self.spec = UpdateSpec.of(config)
        self.tx = transformation(self.spec.chain, mesh, self.params)
        state = jax.eval_shape(self.tx.init, self.params)
        self.opt_state = _placed(state, state_shardings(self.spec.chain, mesh, state))
        self.start = None if anchor_stays(config) else self.params
        self.prompts = config.task.prompts_per_step or config.task.train_size
        longest = config.decode.max_prompt_tokens
        self.width = min(ceil_div(longest, WIDTH_STEP) * WIDTH_STEP, longest)
        self.evaluator = Evaluator.of(config, self._engine(), mesh)
        self.copy = jax.eval_shape(self.evaluator._perturb, self.params, self._members(self.evaluator.lanes))

    def __iter__(self) -> Iterator[Program]:
        yield self.load()
        yield self.perturb()
        yield self.decode()
        yield self.update()

    def load(self) -> Program:
        """From the weights, which are read leaf by leaf, to the optimizer's state."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.opt_state)
        held = self._held()
        return Program(
            "load",
            lambda: jax.jit(self.tx.init, out_shardings=where).lower(self.params),
            times=0,
            turns={},
            parts=held,
            own=frozenset({"parameters", "moments"} | ({"anchor"} if self.start is None else set())),
            work=Work(memory=2.0 * sum(part.device for part in held.values())),
        )

    def perturb(self) -> Program:
        """The weights of one round of members."""
        members = self._members(self.evaluator.lanes)
        copy = self._copy()
        return Program(
            "perturb",
            lambda: Evaluator._perturb.lower(self.evaluator, self.params, members),
            times=self.rounds,
            turns={},
            parts=self._held() | {"compute copy": copy},
            own=frozenset({"parameters", "compute copy"}),
            work=Work(memory=Held.of(self.params).device + copy.device),
        )

    def decode(self) -> Program:
        """Prefill and completions of one round of members, a slotful of prompts at a time; `place_copy` comes first."""
        slots, decode, lanes = self.evaluator.engine.slots, self.config.decode, self.evaluator.at_once
        shape = (self.evaluator.lanes, self.prompts, self.width)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=over_pop(self.mesh))
        rows = Prompts(tokens, tokens, array((0,), jnp.int32, replicated(self.mesh)))  # no shared prefix: a bound
        queue = Queue(self.evaluator.engine, None, np.empty(shape[1:]), None, None, None, axis_name=None)
        width = self.mesh.shape[MODEL]
        size = jnp.dtype(self.config.model.dtype).itemsize
        cache = lanes * cache_bytes(self.model, slots * queue.places, size) // width
        flops = prefill_flops(self.model, self.prompts, self.width) + decode_flops(
            self.model, self.prompts, self.width, decode.max_new_tokens
        )
        memory = decode_memory(
            self.model,
            self.prompts,
            self.width,
            decode.max_new_tokens,
            steps=ceil_div(self.prompts, slots) * decode.max_new_tokens,
            copy=self._matrices(size),
            itemsize=size,
        )
        return Program(
            "decode",
            lambda: Evaluator._decode.lower(self.evaluator, self.copy, rows),
            times=self.rounds,
            turns=queue.turns(),
            parts=self._held() | {"compute copy": self._copy(), "KV cache": Held(cache)},
            own=frozenset({"compute copy", "KV cache"}),
            work=Work(flops * lanes / width, memory * lanes / width),
        )

    def update(self) -> Program:
        """Estimate and step."""
        n = self.config.es.population
        everywhere = replicated(self.mesh)
        members = Members(
            array((n,), jnp.uint32, everywhere),
            array((n,), jnp.float32, everywhere),
            paired=self.config.es.antithetic,
        )
        weights, rates = array((n,), jnp.float32, everywhere), array((2,), jnp.float32, everywhere)
        held = self._held()
        total = sum(part.device + part.host for part in held.values())
        return Program(
            "update",
            lambda: update.lower(
                self.spec, self.mesh, self.params, self.opt_state, self.start, members, weights, rates
            ),
            times=1,
            turns={"": n},
            parts=held,
            own=frozenset(held),
            work=Work(memory=total + held["parameters"].device),
        )

    @property
    def rounds(self) -> int:
        """Rounds of members in an iteration."""
        return ceil_div(self.config.es.population, self.evaluator.lanes)

    def place_copy(self, shardings: Any) -> None:
        """Take the members' weights where the compiled `perturb` leaves them."""
        self.copy = _placed(self.copy, shardings)

    def _engine(self) -> Engine:
        decode, total = self.config.decode, self.prompts
        return Engine(
            self.model,
            slots=min(decode.slots, total),
            max_prompt_tokens=decode.max_prompt_tokens,
            max_new_tokens=decode.max_new_tokens,
            stop_token_ids=(0,),
            unroll=False,
        )

    def _members(self, n: int) -> Members:
        where = over_pop(self.mesh)
        return Members(array((n,), jnp.uint32, where), array((n,), jnp.float32, where))

    def _held(self) -> dict[str, Held]:
        """What a run has on its devices at any time."""
        anchor = optax.tree.get(self.opt_state, "anchor", None) if self.start is None else self.start
        moments = Held.of(self.opt_state)
        if self.start is None:
            moments = Held(moments.device - Held.of(anchor).device, moments.host - Held.of(anchor).host)
        return {"parameters": Held.of(self.params), "anchor": Held.of(anchor), "moments": moments}

    def _copy(self) -> Held:
        sizes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.copy))
        return Held(sizes // self.mesh.size)

    def _matrices(self, itemsize: int) -> int:
        """Bytes of a member's weights that a decode step reads."""
        return sum(matrix_weights(self.model)) * itemsize


def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """A shape in the place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, where: array(leaf.shape, leaf.dtype, where), tree, shardings)


def find_shape(config: RunConfig) -> tuple[TransformerConfig, str]:
    """The shape of a run's base model, and where it was found: "files" (a folder with a config.json, a .gguf, the hub
    or its cache), or "published" (`es_jax.models.known_configs`) where a hub name cannot be had.

    Raises:
      ValueError: an empty model.source, or a config that asks for what is not implemented.
      FileNotFoundError, PermissionError: it is not here, not on the hub or not to be had, and not in the table.
    """
    try:
        return base_config(config), "files"
    except (FileNotFoundError, PermissionError) as error:
        known = published(config.model.source)
        if known is None:
            raise type(error)(f"{error}; shapes known without it: {', '.join(PUBLISHED)}") from error
        return known, "published"


def programs_of(config: RunConfig, model: TransformerConfig, topology: Topology) -> Programs:
    """A run's programs, on the mesh that it asks for; model.dtype "auto" is bfloat16, as on any accelerator.

    Raises:
      ValueError: a mesh that the topology or the model does not allow.
    """
    if config.model.dtype == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    mesh = mesh_of(config, model, devices=list(topology.devices), memory=topology.chip.memory)
    return pkgutil.resolve_name(METHODS[config.method].programs)(config, model, mesh)
