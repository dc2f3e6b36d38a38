"""Evolution Strategies: perturbs and decodes members, and moves the weights by their rewards (arXiv 2509.24372)."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from es_jax.core import processes, rng
from es_jax.core.chunked_map import ceil_div
from es_jax.core.low_rank import LowRank, split
from es_jax.core.mesh import (
    GROUPS,
    MODEL,
    leaf_spec,
    offset_of,
    only,
    over_groups,
    own_rows,
    platform_of,
    replicated,
    to_devices,
)
from es_jax.core.one_pass import one_pass
from es_jax.core.tree import map_named, named_leaves
from es_jax.es.low_rank import LowRankNoise
from es_jax.es.noise import GaussianNoise
from es_jax.es.population import Members, Population, unperturbed_members
from es_jax.es.shaping import SHAPINGS, centred_on_prompts
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import Packing, Prompts
from es_jax.generate.sampling import sampler_of
from es_jax.models.layers import Transposed
from es_jax.models.sharding import RULES
from es_jax.models.transformer import unstack_layers, without_layers
from es_jax.profiling.clock import timed
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Graded, Grader, check_scores
from es_jax.training.config import RunConfig
from es_jax.training.diagnostics import diagnose
from es_jax.training.method import Progress, StepResult, TokenLists
from es_jax.training.sizes import as_decoded
from es_jax.training.state import State, compute_dtype, make_noise

T = TypeVar("T")
LANE = "lane"  # the axis over the members that a group evaluates at once


class Evolution:
    """Members → rewards → weights → estimate and update (arXiv 2509.24372)."""

    def __init__(
        self, config: RunConfig, evaluator: "Evaluator", state: State, packing: Packing, streams: int = rng.STREAMS
    ):
        self._config, self._state, self._packing, self._streams = config, state, packing, streams
        self._evaluator = evaluator.sampling(config.decode.temperature)
        self._population = Population(
            config.es.population, seed=config.train.seed, antithetic=config.es.antithetic, streams=streams
        )
        self.unit, self.models = ("member", config.es.population), config.es.population

    def step(self, step: int, prompts: TokenLists, grade: Grader, done: Progress) -> StepResult:
        """The step that `Method` describes; docs/diagnostics.md explains what it records."""
        es, rates, members = self._config.es, self._config.rates(step), self._population.members(step)
        scaled = dataclasses.replace(members, sign=members.sign * np.float32(rates.sigma / es.sigma))
        each = es.prompts_per_member or len(prompts)
        seen = None if each == len(prompts) else self._population.deal(step, len(prompts), each)
        keys = self._row_keys(step, len(prompts))
        graded = self._graded(scaled, prompts, grade, done, seen, keys)
        rewards = np.array([_mean_reward(completions) for completions in graded])
        gap, centre, every = None, [], self._config.evals.every
        if every and (step - 1) % every == 0 and es.rewards == "task":  # the step after an evaluation
            if seen is None:
                centre = self._graded(unperturbed_members(1), prompts, grade, lambda n: None, keys=keys)
            else:
                centre = self._dealt(prompts, grade, keys)
            gap = float(rewards.mean() - _mean_reward(*centre))
            gap = gap if math.isfinite(gap) else None  # with es.nan_rewards="worst"
        if es.rewards == "random":
            rewards = rng.random_rewards(self._config.train.seed, step, len(members))
        weights, compared = self._weights(rewards, [*graded, *centre], seen)
        entry = Entry.of(step, members, rewards=rewards, weights=weights, rates=rates)
        self._state.apply(entry)
        as_compared = dataclasses.replace(entry, rewards=[float(x) if np.isfinite(x) else None for x in compared])
        metrics = diagnose(as_compared, learning_rate=rates.learning_rate, sigma=rates.sigma)
        if self._config.optim.name != "sgd" or es.rewards == "random":
            metrics["expected_gain"] = None
        return entry, graded, {**metrics, "curvature_gap": gap, **rates._asdict()}

    def seconds_alone(self, entry: Entry) -> dict[str, float]:
        """The estimate, which XLA fuses with the optimizer."""
        return {"estimate": self._state.estimate_seconds(entry)}

    def _row_keys(self, step: int, prompts: int) -> np.ndarray | None:
        if not self._config.decode.temperature:
            return None
        return rng.row_keys(self._config.train.seed, step, prompts, streams=self._streams)

    def _graded(
        self,
        members: Members,
        prompts: TokenLists,
        grade: Grader,
        done: Progress,
        seen: np.ndarray | None = None,
        keys: np.ndarray | None = None,
    ) -> list[list[Graded]]:
        """All members' completions, in the order of the prompts, or of the prompts `seen` [N, k] by each member."""
        rows, own, everyone = self._packing.pack(prompts, rows=len(prompts)), {}, range(len(prompts))
        for member, tokens, length in self._evaluator.members(self._state.params, members, rows, seen, keys):
            dealt = everyone if seen is None else seen[member].tolist()
            own[member] = dealt, grade(dealt, tokens, length)
            done(1)
        graded = list(grade.shared(own).values())
        done(len(members) - len(own))  # graded by other processes
        return graded

    def _dealt(self, prompts: TokenLists, grade: Grader, keys: np.ndarray | None) -> list[list[Graded]]:
        """θ's own completions of the prompts, in one unordered list. Each lane decodes a few of the prompts, as in
        training. With all prompts in one lane the program would be a different one, and the other lanes would decode
        only padding."""
        rows, keys_of = self._packing.pack(prompts, rows=len(prompts)), () if keys is None else (keys,)
        (dealt,) = self._evaluator.unperturbed(self._state.params, [rows], keys_of)
        own = {lane: (rows, grade(rows, tokens, length)) for lane, (rows, tokens, length) in dealt.items()}
        return [[*itertools.chain(*grade.shared(own).values())]]

    def _weights(
        self, rewards: np.ndarray, graded: list[list[Graded]], seen: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The shaped rewards, and the values that were shaped. If members saw different prompts, those values are the
        rewards relative to other members on the same prompts. Scores that are not finite are refused, unless
        es.nan_rewards counts them as the worst of the step."""
        es, check = self._config.es, functools.partial(check_scores, itertools.chain(*graded), self._config.task.name)
        try:
            if seen is not None and es.rewards == "task":
                own = [[one.score.reward for one in completions] for completions in graded[: len(rewards)]]
                rewards = centred_on_prompts(np.array(own), seen)
            weights = SHAPINGS[es.shaping](rewards, nan_rewards=es.nan_rewards)
        except ValueError as error:  # that error names the members; this one names their rows
            check(remedy=str(error))
            raise
        if es.nan_rewards == "error":
            check()
        return weights, rewards


ROWS_AT_ONCE = 2**22  # numbers gathered at once from a matrix that is not stacked over layers: 16 MiB of float32


def _mean_reward(completions: list[Graded]) -> float:
    return float(np.mean([completion.score.reward for completion in completions]))


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield each item only after the next one is dispatched, so that the devices work while the host reads this one."""
    for item, _ in itertools.pairwise(itertools.chain(items, [None])):
        yield item  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Perturbs and decodes members. Each member takes a group of devices; a group takes several members if the model is
    small.

    A *lane* is a place in the batch of members: one member with its own queue of prompts. A call runs `lanes` of them.
    """

    engine: Engine
    mesh: Mesh
    noise: GaussianNoise
    sigma: float
    dtype: DTypeLike
    at_once: int

    @classmethod
    def of(cls, config: RunConfig, engine: Engine, mesh: Mesh) -> "Evaluator":
        """The evaluator of a run. It keeps only what its programs need from the config, so that runs in one process
        share them."""
        noise, dtype = make_noise(config), compute_dtype(config)
        share = ceil_div(config.es.population, mesh.shape[GROUPS])  # members of a group: every group has some
        at_once = min(config.decode.members_at_once or 1, share)
        engine = as_decoded(config, engine, mesh, at_once)
        return cls(engine, mesh, noise, config.es.sigma, dtype, at_once=at_once)

    def sampling(self, temperature: float, top_p: float = 1.0) -> "Evaluator":
        """The same evaluator with sampled completions; itself at temperature 0."""
        return dataclasses.replace(
            self, engine=dataclasses.replace(self.engine, sampler=sampler_of(temperature, top_p))
        )

    @property
    def shared(self) -> bool:
        """Whether all members decode with one set of weights, and each adds its own pairs of thin matrices."""
        return isinstance(self.noise, LowRankNoise)

    @property
    def lanes(self) -> int:
        return self.mesh.shape[GROUPS] * self.at_once

    @property
    def layer_by_layer(self) -> bool:
        """Whether layers are made one by one, as the engine needs them; splitting stacked layers would write them
        twice."""
        return self.engine.unrolled and self.at_once == 1 and self.noise.layers_alone and not self.shared

    @functools.partial(jax.jit, static_argnums=0)
    def shared_weights(self, params: Any) -> Any:
        """The one copy of θ that all members share: in the compute dtype and the engine's layout, replicated over the
        groups and sharded over `model`. With it comes the embedding's rounding error (`LowRank.rest`)."""

        def whole(name: str, leaf: Array) -> tuple[Array, Array | None]:
            spec, rest = leaf_spec(self.mesh, name, leaf.shape, RULES), None
            if name == "embed/embedding":
                leaf, rest = split(leaf, self.dtype)

            def gathered(part: Array) -> Array:
                part = jax.lax.with_sharding_constraint(part.astype(self.dtype), NamedSharding(self.mesh, spec))
                return jax.lax.with_sharding_constraint(part, NamedSharding(self.mesh, only(spec, MODEL)))

            return gathered(leaf), rest if rest is None else gathered(rest)

        parts = map_named(whole, params)
        weights = jax.tree.map(lambda pair: pair[0], parts, is_leaf=lambda x: isinstance(x, tuple))
        return self.engine.layout(weights), parts["embed"]["embedding"][1]

    @functools.partial(jax.jit, static_argnums=0)
    def member_pairs(self, params: Any, members: Members) -> Any:
        """What each member of a round adds to the shared weights: (a, b) for every matrix, and vectors. Lanes are the
        first axis."""
        noise, shapes = self.noise, jax.eval_shape(lambda: params)
        assert isinstance(noise, LowRankNoise)
        vectors = {name: leaf for name, leaf in named_leaves(params) if not noise.is_matrix(name, leaf)}

        def one(vectors: Any, member: Members) -> Any:
            tree = map_named(lambda name, shape: vectors.get(name, shape), shapes)
            pairs = noise.pair(tree, member, sigma=self.sigma, dtype=self.dtype)
            return unstack_layers(pairs) if self.engine.unrolled else pairs

        lanes, specs = self._lanes(one, mapped=(None, 0)), (PartitionSpec(), PartitionSpec(GROUPS))
        return self._grouped(lanes, in_specs=specs)(vectors, members)

    def perturb(self, params: Any, members: Members, old: Any = None, shared: Any = None) -> Any:
        """The weights of a round of members, in the engine's layout. If layers are made one by one, they take the
        memory of the `old` round's weights, which are then gone: fresh memory costs a CPU as much as the noise. If
        members share weights, this returns the shared weights (made from params unless given) and `member_pairs`."""
        if self.shared:
            shared = self.shared_weights(params) if shared is None else shared
            return shared, self.member_pairs(params, members)
        if not self.layer_by_layer:
            return self._perturb(params, members)
        layers, rest = {"layers": params["layers"]}, without_layers(params)
        count = len(jax.tree.leaves(layers)[0])
        spare = [None] * count if old is None else [{"layers": layer} for layer in old["layers"]]
        out = self._perturb(rest, members, None, old and {name: old[name] for name in rest})
        each = (self._perturb(layers, members, np.int32(i), spare[i])["layers"] for i in range(count))
        return {**out, "layers": tuple(each)}

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=4, keep_unused=True)
    def _perturb(self, params: Any, members: Members, layer: Array | None = None, old: Any = None) -> Any:
        """All weights in one program; with `layer` only that layer, and then params holds nothing but layers."""
        specs = map_named(lambda name, leaf: leaf_spec(self.mesh, name, leaf.shape, RULES), params)

        def one(params, member, layer):
            out = map_named(functools.partial(self._perturbed_leaf, member=member, layer=layer), params, specs)
            return (
                self.engine.layout(out)
                if layer is None and "layers" in params
                else self.engine.with_transposed_kernels(out)
            )

        parts = jax.tree.map(lambda spec: only(spec, GROUPS), specs)
        in_specs = (parts, PartitionSpec(GROUPS), PartitionSpec())
        return self._grouped(self._lanes(one, mapped=(None, 0, None)), in_specs=in_specs)(params, members, layer)

    def _perturbed_leaf(
        self, name: str, part: Array, spec: PartitionSpec, member: Members, layer: Array | None
    ) -> Array:
        """A member's leaf, from its shards over `groups`; at most one layer of a sharded leaf is gathered at once."""
        cut, size = only(spec, MODEL), self.mesh.shape[GROUPS]

        if layer is None and size == 1 and platform_of(self.mesh) == "gpu" and self.noise.elementwise:
            return self._perturbed_in_one_pass(name, part, cut, member)

        def perturbed(part, row=None):
            whole = {name: _gathered(self.mesh, part, spec)}
            leaf = self.noise.apply(whole, member, sigma=self.sigma, dtype=self.dtype, row=row)[name]
            return jax.lax.with_sharding_constraint(leaf, cut)

        def alone(i):
            return perturbed(jax.lax.dynamic_slice_in_dim(part, i, 1), (i, len(part)))

        if layer is not None:
            return alone(layer)[0]
        if size == 1 or GROUPS not in spec or not self.noise.layers_alone:
            return perturbed(part)
        if not name.startswith("layers/"):
            return perturbed(part) if spec[0] == GROUPS else self._perturbed_rows(name, part, spec, member)

        def stacked(i, stack):
            stack = jax.lax.dynamic_update_slice_in_dim(stack, alone(i), i, 0)
            return jax.lax.with_sharding_constraint(stack, cut)

        shape = [n * size if entry == GROUPS else n for n, entry in zip(part.shape, spec, strict=True)]
        return jax.lax.fori_loop(0, len(part), stacked, jax.lax.empty(tuple(shape), self.dtype))

    def _perturbed_rows(self, name: str, part: Array, spec: PartitionSpec, member: Members) -> Array:
        """A member's matrix, gathered by blocks of rows: each device holds some columns, and some rows along
        `model`."""
        cut = only(spec, MODEL)

        def local(part: Array, member: Members) -> Array:
            rows, columns = len(part), part.shape[1] * self.mesh.shape[GROUPS]
            count = ceil_div(rows * columns, ROWS_AT_ONCE)
            block, start = ceil_div(rows, count), offset_of(cut, part.shape)[0]

            def turn(i: Array, whole: Array) -> Array:
                at = jnp.minimum(i * block, rows - block)  # the last block overlaps the one before it
                some = jax.lax.dynamic_slice_in_dim(part, at, block)
                leaf = {name: jax.lax.all_gather(some, GROUPS, axis=1, tiled=True)}
                row = start + at, rows * self.mesh.shape[MODEL] if cut[0] else rows
                leaf = self.noise.apply(leaf, member, sigma=self.sigma, dtype=self.dtype, row=row)
                leaf = with_layout_constraint(leaf[name], Layout((0, 1)))  # else a TPU transposes all of it later
                return jax.lax.dynamic_update_slice_in_dim(whole, leaf, at, 0)

            return jax.lax.fori_loop(0, count, turn, jax.lax.empty((rows, columns), self.dtype))

        everywhere = PartitionSpec()
        inside = jax.shard_map(local, in_specs=(cut, everywhere), out_specs=cut, axis_names={MODEL}, check_vma=False)
        return inside(part, member)

    def _perturbed_in_one_pass(
        self, name: str, leaf: Array, cut: PartitionSpec, member: Members, *, interpret: bool = False
    ) -> Array:
        """A member's leaf on GPUs, made by a kernel: XLA would write the random words of some leaves to memory and read
        them."""

        def elements(index: Any, scalars: Any, values: Any) -> tuple[list[Array], list[Array]]:
            seed, scale = (x[0] for x in scalars)
            return [self.noise.apply_at(name, leaf.shape, index, seed, scale, values[0])], []

        def local(part: Array, *scalars: Array) -> Array:
            results, _ = one_pass(
                elements, scalars, [part], [self.dtype], offset=offset_of(cut, part.shape), platform="gpu",
                interpret=interpret,
            )  # fmt: skip
            return results[0]

        scalars = (x.reshape(1) for x in (member.seed, jnp.float32(self.sigma) * member.sign))
        everywhere = PartitionSpec()
        inside = jax.shard_map(
            local, in_specs=(cut, everywhere, everywhere), out_specs=cut, axis_names={MODEL}, check_vma=False
        )
        return inside(leaf, *scalars)

    @functools.partial(jax.jit, static_argnums=0)
    def _decode(self, params: Any, prompts: Prompts, keys: Any = None) -> Any:
        """Completions of a round of members. `params` come from `perturb`; a sampler needs `keys`, uint32 [lanes, Q,
        2]."""

        engine, lane = self.engine, LANE if self.vmapped else None
        part = engine.parted(self.at_once, *prompts.tokens.shape[1:])
        of_member = _with_pairs if self.shared else lambda weights: weights
        own = (None, 0) if self.shared else (0,)  # shardings of shared arguments, and of per-lane ones

        def rows_of(tokens, positions, keys):
            return tokens, positions, None if keys is None else rng.wrapped(keys)

        def fill(weights, tokens, positions, keys, prefix):
            return engine.fill(of_member(*weights), *rows_of(tokens, positions, keys), prefix=prefix, axis_name=LANE)

        def one(weights, tokens, positions, keys, filled, prefix):
            rows = rows_of(tokens, positions, keys)
            generation = engine.decode(of_member(*weights), *rows, prefix=prefix, axis_name=lane, filled=filled)
            return generation.tokens, generation.length

        def group(weights, tokens, positions, prefix, keys):
            filled = None
            if part < self.at_once:
                *common, apart = weights
                each = self._lanes(fill, mapped=(own, 0, 0, 0, None))
                some = lambda lanes: each((*common, lanes[0]), *lanes[1:], prefix)  # noqa: E731
                filled = _in_parts(some, (apart, tokens, positions, keys), part=part)
            return self._lanes(one, mapped=(own, 0, 0, 0, 0, None))(weights, tokens, positions, keys, filled, prefix)

        lanes, everywhere = PartitionSpec(GROUPS), PartitionSpec()
        weights, specs = (params, (everywhere, lanes)) if self.shared else ((params,), (lanes,))
        return self._grouped(group, in_specs=(specs, lanes, lanes, everywhere, lanes))(weights, *prompts, keys)

    @property
    def vmapped(self) -> bool:
        return self.at_once > 1 or self.shared

    def _lanes(self, one: Any, *, mapped: tuple) -> Any:
        """`one` over the lanes of a group: a vmap, or a plain call for a single lane."""
        if self.vmapped:
            return jax.vmap(one, in_axes=mapped, axis_name=LANE)

        def alone(*args):
            first = functools.partial(jax.tree.map, lambda x: x[0])
            args = (arg if axis is None else first(arg) for arg, axis in zip(args, mapped, strict=True))
            return jax.tree.map(lambda x: x[None], one(*args))

        return alone

    def _grouped(self, group: Any, *, in_specs: tuple) -> Any:
        """A function of a group's lanes, as `_lanes` returns it, over all groups of devices."""
        lanes = PartitionSpec(GROUPS)
        return jax.shard_map(
            group, mesh=self.mesh, in_specs=in_specs, out_specs=lanes, axis_names={GROUPS}, check_vma=False
        )

    def members(
        self,
        params: Any,
        members: Members,
        prompts: Prompts,
        seen: np.ndarray | None = None,
        keys: np.ndarray | None = None,
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(member, tokens [Q, L], length [Q]) of every member that this process decodes, on all prompts, or on those
        with the indices `seen` [N, Q]. A sampler needs `keys` [prompts, 2], one for each prompt.

        Each round is dispatched before the previous one is yielded, so that the devices have work while the host
        grades. Unused lanes of the last round decode padding. The weights of a round are freed, or their memory reused,
        before the next round's are made, except if members are small and several run at once.
        """
        count, order = len(members), np.arange(len(members))
        if seen is not None and self.vmapped:  # neighbours get prompts of similar length: see `Engine.parted`
            order = np.argsort(-(prompts.positions >= 0).sum(axis=1)[seen].max(axis=1), kind="stable")
        shared = timed("perturb", processes.launch(self.shared_weights, params)) if self.shared else None

        def rounds() -> Iterator[tuple[np.ndarray, Any]]:
            perturbed = outputs = None
            for first in range(0, count, self.lanes):
                index = np.arange(first, first + self.lanes)
                which = order[np.minimum(index, count - 1)]
                lanes = members[which]
                if not self.vmapped:  # a member's weights are large: free those of the last round first
                    processes.wait(functools.partial(jax.block_until_ready, outputs))
                lanes = to_devices(lanes, over_groups(self.mesh))
                perturbed = timed("perturb", processes.launch(self.perturb, params, lanes, perturbed, shared))
                dealt = np.arange(len(prompts.tokens))[None] if seen is None else seen[which]
                shape = (self.lanes, dealt.shape[1], prompts.tokens.shape[1])
                tokens = np.broadcast_to(prompts.tokens[dealt], shape)
                positions = np.where((index < count)[:, None, None], prompts.positions[dealt], np.int32(-1))
                rows = self._rows(tokens, positions, prompts.prefix)
                own = () if keys is None else (self._keys(np.broadcast_to(keys[dealt], (*shape[:2], 2))),)
                outputs = timed("decode", processes.launch(self._decode, perturbed, rows, *own))
                perturbed = perturbed if self.layer_by_layer else None
                yield which[index < count].tolist(), outputs

        for lanes, outputs in one_ahead(rounds()):
            yield from _unpack(lanes, outputs)

    def unperturbed(
        self, params: Any, queues: Iterable[Prompts], keys: Iterable[np.ndarray] = ()
    ) -> Iterator[dict[int, tuple[range, np.ndarray, np.ndarray]]]:
        """Decodes θ itself on several queues of prompts, each dealt out to the lanes. Yields for each queue: lane →
        (rows, tokens, length). A sampler needs `keys`: for each queue those of its prompts, uint32 [Q, 2].

        Each queue is dispatched before the previous one is yielded. At most two queues hold caches, since a CPU would
        run all of them in parallel. Each process has the lanes of its own devices.
        """
        if not (queues := list(queues)):
            return

        def calls() -> Iterator[tuple[list[range], Any]]:
            nobody = to_devices(unperturbed_members(self.lanes), over_groups(self.mesh))
            weights = timed("perturb", processes.launch(self.perturb, params, nobody))
            for prompts, own_keys in itertools.zip_longest(queues, keys):
                count, width = prompts.tokens.shape
                each = ceil_div(count, self.lanes * self.engine.slots) * self.engine.slots
                tokens = np.zeros((self.lanes, each, width), np.int32)
                positions = np.full_like(tokens, -1)
                rows = [range(lane, count, self.lanes) for lane in range(min(self.lanes, count))]
                data = np.zeros((*tokens.shape[:2], 2), np.uint32)
                for lane, own in enumerate(rows):
                    tokens[lane, : len(own)], positions[lane, : len(own)] = prompts.tokens[own], prompts.positions[own]
                    if own_keys is not None:
                        data[lane, : len(own)] = own_keys[own]
                arguments = weights, self._rows(tokens, positions, prompts.prefix)
                dealt = () if own_keys is None else (self._keys(data),)
                yield rows, timed("decode", processes.launch(self._decode, *arguments, *dealt))

        for rows, outputs in one_ahead(calls()):
            lanes = _unpack(range(len(rows)), outputs)
            yield {lane: (rows[lane], tokens, length) for lane, tokens, length in lanes}

    def _keys(self, data: np.ndarray) -> Array:
        return to_devices(data, over_groups(self.mesh))

    def _rows(self, tokens: np.ndarray, positions: np.ndarray, prefix: np.ndarray) -> Prompts:
        tokens, positions = to_devices((tokens, positions), over_groups(self.mesh))
        return Prompts(tokens, positions, to_devices(prefix, replicated(self.mesh)))


def _gathered(mesh: Mesh, part: Array, spec: PartitionSpec) -> Array:
    """The leaf, gathered over `groups` and still sharded over `model`; call it inside a shard_map over `groups`."""
    if GROUPS not in spec or mesh.shape[GROUPS] == 1:
        return part
    gather = functools.partial(jax.lax.all_gather, axis_name=GROUPS, axis=list(spec).index(GROUPS), tiled=True)
    cut = only(spec, MODEL)  # explicit, since the partitioner would gather over `model` too
    return jax.shard_map(gather, in_specs=cut, out_specs=cut, axis_names={MODEL}, check_vma=False)(part)


def _in_parts(some: Any, lanes: Any, *, part: int) -> Any:
    """Apply `some` to so many lanes at a time; its results are written in place."""
    at = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, part), lanes)  # noqa: E731
    count = jax.tree.leaves(lanes)[0].shape[0]
    empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), jax.eval_shape(some, at(0)))
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)

    def turn(i: Array, whole: Any) -> Any:
        return jax.tree.map(lambda x, own: write(x, own, i * part), whole, some(at(i * part)))

    return jax.lax.fori_loop(0, count // part, turn, empty)


def _with_pairs(shared: Any, pairs: Any) -> Any:
    """A member's weights from the shared ones: `LowRank` matrices, and its own vectors."""
    weights, rest = shared

    def own(base: Any, pair: Any) -> Any:
        return LowRank(base, *pair) if isinstance(pair, tuple) else pair

    params = jax.tree.map(own, weights, pairs, is_leaf=lambda leaf: isinstance(leaf, Transposed))
    params["embed"]["embedding"] = dataclasses.replace(params["embed"]["embedding"], rest=rest)
    return params


def _unpack(members: Iterable[int], outputs: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(member, tokens, length) for those of a round's lanes that this process holds."""
    tokens, length = processes.wait(lambda: [own_rows(output) for output in outputs])
    for lane, member in enumerate(members):
        if lane in tokens:
            yield int(member), tokens[lane], length[lane]
