"""The programs of a run, lowered for devices that are not here: they are asked for from the run's own classes.

`load` makes the optimizer's state (the anchor in it), `perturb` a round of members, `decode` their completions,
`update` is the estimate and the step. Arrays have shapes and shardings, but no numbers.
"""

import dataclasses
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from es_jax.core import rng
from es_jax.core.chunked_map import ceil_div
from es_jax.core.mesh import MODEL, over_pop, replicated
from es_jax.es.population import Members
from es_jax.generate.decode_spec import LoopSizes
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import WIDTH_STEP, Prompts
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
class Bytes:
    """Bytes of arrays on one device, and of its share in the host's pinned memory."""

    device: int = 0
    host: int = 0

    @classmethod
    def of(cls, tree: Any) -> "Bytes":
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
    parts: Mapping[str, Bytes]
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
        engine = Engine(
            model,
            slots=min(config.decode.slots, self.prompts),
            max_prompt_tokens=longest,
            max_new_tokens=config.decode.max_new_tokens,
            stop_token_ids=(0,),
            unroll=False,
        )
        self.evaluator = Evaluator.of(config, engine, mesh)
        self.members = _members(self.evaluator.lanes, over_pop(mesh))
        self.copy = jax.eval_shape(self.evaluator._perturb, self.params, self.members)

    def __iter__(self) -> Iterator[Program]:
        yield self.load()
        yield self.perturb()
        yield self.decode()
        yield self.update()

    def load(self) -> Program:
        """From the weights, which are read leaf by leaf, to the optimizer's state."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.opt_state)
        resident = self._resident()
        return Program(
            "load",
            lambda: jax.jit(self.tx.init, out_shardings=where).lower(self.params),
            times=0,
            turns={},
            parts=resident,
            own=frozenset({"parameters", "moments"} | ({"anchor"} if self.start is None else set())),
            work=Work(memory=2.0 * sum(part.device for part in resident.values())),
        )

    def perturb(self) -> Program:
        """The weights of one round of members."""
        copy = self._copy()
        return Program(
            "perturb",
            lambda: Evaluator._perturb.lower(self.evaluator, self.params, self.members),
            times=self.rounds,
            turns={},
            parts=self._resident() | {"compute copy": copy},
            own=frozenset({"parameters", "compute copy"}),
            work=Work(memory=Bytes.of(self.params).device + copy.device),
        )

    def decode(self) -> Program:
        """Prefill and completions of one round of members, a slotful of prompts at a time; `place_copy` comes first."""
        tokens = array((self.evaluator.lanes, self.prompts, self.width), jnp.int32, over_pop(self.mesh))
        rows = Prompts(tokens, tokens, array((0,), jnp.int32, replicated(self.mesh)))  # no shared prefix: a bound
        return self._completions(
            "decode",
            lambda: Evaluator._decode.lower(self.evaluator, self.copy, rows),
            engine=self.evaluator.engine,
            prompts=self.prompts,
            lanes=self.evaluator.at_once,
            times=self.rounds,
        )

    def _completions(
        self,
        name: str,
        lower: Callable[[], Any],
        *,
        engine: Engine,
        prompts: int,
        times: int,
        lanes: int = 1,
        own: Set[str] = frozenset(),
    ) -> Program:
        """A program that completes so many prompts on each of a group's lanes."""
        new, share = self.config.decode.max_new_tokens, self.mesh.shape[MODEL]
        sizes, itemsize = LoopSizes.of(engine, prompts, self.width), jnp.dtype(self.config.model.dtype).itemsize
        cache = lanes * cache_bytes(self.model, sizes.slots * sizes.places, itemsize) // share
        flops = prefill_flops(self.model, prompts, self.width) + decode_flops(self.model, prompts, self.width, new)
        memory = decode_memory(
            self.model,
            prompts,
            self.width,
            new,
            steps=ceil_div(prompts, sizes.slots) * new,
            copy=sum(matrix_weights(self.model)) * itemsize,
            itemsize=itemsize,
        )
        return Program(
            name,
            lower,
            times=times,
            turns=sizes.turns,
            parts=self._resident() | {"compute copy": self._copy(), "KV cache": Bytes(cache)},
            own=frozenset({"compute copy", "KV cache", *own}),
            work=Work(flops * lanes / share, memory * lanes / share),
        )

    def update(self) -> Program:
        """Estimate and step."""
        n, everywhere = self.config.es.population, replicated(self.mesh)
        members = dataclasses.replace(_members(n, everywhere), paired=self.config.es.antithetic)
        weights, rates = array((n,), jnp.float32, everywhere), array((2,), jnp.float32, everywhere)
        resident = self._resident()
        total = sum(part.device + part.host for part in resident.values())
        return Program(
            "update",
            lambda: update.lower(
                self.spec, self.mesh, self.params, self.opt_state, self.start, members, weights, rates
            ),
            times=1,
            turns={"": n},
            parts=resident,
            own=frozenset(resident),
            work=Work(memory=total + resident["parameters"].device),
        )

    @property
    def rounds(self) -> int:
        """Rounds of members in an iteration."""
        return ceil_div(self.config.es.population, self.evaluator.lanes)

    def place_copy(self, shardings: Any) -> None:
        """Take the members' weights where the compiled `perturb` leaves them."""
        self.copy = _placed(self.copy, shardings)

    def _resident(self) -> dict[str, Bytes]:
        """What a run has on its devices at any time."""
        anchor = optax.tree.get(self.opt_state, "anchor", None) if self.start is None else self.start
        moments = Bytes.of(self.opt_state)
        if self.start is None:
            moments = Bytes(moments.device - Bytes.of(anchor).device, moments.host - Bytes.of(anchor).host)
        return {"parameters": Bytes.of(self.params), "anchor": Bytes.of(anchor), "moments": moments}

    def _copy(self) -> Bytes:
        sizes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.copy))
        return Bytes(sizes // self.mesh.size)


def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """A shape in the place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _members(n: int, sharding: Any) -> Members:
    return Members(array((n,), jnp.uint32, sharding), array((n,), jnp.float32, sharding))


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
