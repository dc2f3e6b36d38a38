"""The device side of an engine: a queue of prompts runs through a fixed number of slots, in one program.

Time passes in turns: free slots are filled from the queue by a prefill of a fixed number of rows, then the live rows
take up to CHUNK decode steps. A step writes to a small cache of the chunk, at one place for all rows, and only reads
the slots' own caches; behind the chunk it is merged into them, each row where it ended. So nothing is copied from step
to step, and a chunk decodes only as many rows, and attends only as many places, as are in use, in a few compiled sizes.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from es_jax.models.cache import KVCache, Past, PerLayer
from es_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from es_jax.generate.engine import Engine

CHUNK = 32  # decode steps between merges
SHORTEST = 128  # places that a chunk attends at least, where there are as many
FILL, STEPS = "fill", "steps"  # what prefill and the decode steps are called in traces and in the compiled program
FEWEST = 8  # rows that a chunk decodes at least, where there are as many slots


class Generation(NamedTuple):
    """What was generated for Q prompts.

    Attributes:
      tokens: int32 [Q, L], the completion, its stop token included; 0 behind it.
      length: int32 [Q], how many tokens of the row count, 0..L. Below L, or with a stop token last, the row stopped
        by itself; otherwise it was cut at L = max_new_tokens.
      logprob: float32 [Q, L], each token's log-probability under the model at temperature 1; None if not asked for.
    """

    tokens: Int32[Array, "Q L"]
    length: Int32[Array, " Q"]
    logprob: Float32[Array, "Q L"] | None


class Slots(NamedTuple):
    """The rows being decoded, one a slot."""

    row: Int32[Array, " B"]  # which prompt; Q where there is none
    token: Int32[Array, " B"]  # chosen last, not yet fed
    length: Int32[Array, " B"]  # tokens in the slot's cache, those of the prefix not counted
    made: Int32[Array, " B"]  # tokens generated
    live: Bool[Array, " B"]


class _State(NamedTuple):
    kv: tuple[PerLayer, PerLayer]  # the slots' caches
    slots: Slots
    taken: Array  # rows taken from the queue
    out: Generation
    filling: Array  # whether slots are to be filled; agreed, like `more`
    more: Array  # whether anything is left to do


class _Chunk(NamedTuple):
    cache: KVCache
    slots: Slots
    made: tuple[Array, Array | None]  # tokens and log-probabilities [b, K]
    going: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Queue:
    """One call's queue; `Engine.decode` says what its fields are. Make it and `run` it inside one trace."""

    engine: "Engine"
    params: Any
    tokens: Any
    positions: Any
    keys: Any
    prefix: Any
    axis_name: str | None

    def run(self) -> Generation:
        """All prompts, decoded."""
        state = self._start()
        if not self.single:
            return lax.while_loop(lambda state: state.more, self._turn, state).out
        with jax.named_scope(FILL):
            state = self._fill(state)
        return self._chunk(state, rows=self.rows, places=self.width).out if self.steps else state.out

    @property
    def rows(self) -> int:
        """B, the slots."""
        return min(self.engine.slots, len(self.tokens))

    @property
    def width(self) -> int:
        """P, of the prompts behind the prefix."""
        return self.tokens.shape[1]

    @property
    def steps(self) -> int:
        """K, decode steps of a chunk. A row's first token is its prefill's."""
        return min(CHUNK, self.engine.max_new_tokens - 1)

    @property
    def places(self) -> int:
        """Of a slot's keys and values, those of a chunk among them: all that a row can need, and a chunk more."""
        return self.width + self.steps if self.single else self.width + self.engine.max_new_tokens + 2 * self.steps

    @property
    def single(self) -> bool:
        """Whether one prefill and one chunk are all there is."""
        return len(self.tokens) <= self.engine.slots and self.engine.max_new_tokens - 1 <= CHUNK

    @property
    def fill_rows(self) -> int:
        """Rows of a prefill: not all, so that free slots need not wait for the last one."""
        return self.rows if self.single else -(-self.rows // 4)

    def turns(self) -> dict[str, float]:
        """How often the loops turn where no row stops: the outer one (""), and in each of its turns, on average, the
        inner ones."""
        chunks = -(-len(self.tokens) // self.rows) * -(-(self.engine.max_new_tokens - 1) // max(self.steps, 1))
        fills = -(-len(self.tokens) // self.fill_rows)
        return {"": chunks, FILL: fills / max(chunks, 1), STEPS: self.steps}

    @property
    def row_sizes(self) -> list[int]:
        """Rows that a chunk may have: all slots, a half, a quarter."""
        return sorted({max(-(-self.rows // part), min(FEWEST, self.rows)) for part in (1, 2, 4)})

    @property
    def place_sizes(self) -> list[int]:
        """Places of the slots' caches that a chunk may attend: SHORTEST, doubled up to all that a row can need."""
        most = self.width + self.engine.max_new_tokens - 1
        return [SHORTEST * 2**i for i in range(32) if SHORTEST * 2**i <= 0.75 * most] + [most]

    @property
    def widths(self) -> list[int]:
        """Widths of a prefill: that of the prompts, a half, a quarter."""
        return sorted({min(max(-(-self.width // part), 32), self.width) for part in (1, 2, 4)})

    @functools.cached_property
    def lengths(self) -> Array:
        """[Q], tokens of each prompt behind the prefix; 0 for padding."""
        return jnp.sum(self.positions >= 0, axis=1, dtype=jnp.int32)

    @functools.cached_property
    def count(self) -> Array:
        """How many prompts there are."""
        return jnp.sum(self.lengths > 0, dtype=jnp.int32)

    @functools.cached_property
    def order(self) -> Array:
        """[Q], the order in which they are taken: longest first, so that those filled together are alike."""
        return jnp.argsort(-self.lengths, stable=True).astype(jnp.int32)

    @functools.cached_property
    def past(self) -> tuple[Past, ...]:
        """The prefix, computed once for all rows."""
        if not len(self.prefix):
            return ()
        positions = jnp.arange(len(self.prefix), dtype=jnp.int32)[None]
        cache = self._cache(1, len(self.prefix))
        with jax.named_scope(FILL):
            filled = self._model.hidden(self.params, self.prefix[None], positions=positions, cache=cache)[1]
        assert filled is not None
        return (filled.as_past(),)

    @property
    def _model(self) -> Transformer:
        return Transformer(self.engine.config)

    def _cache(self, rows: int, length: int, past: tuple[Past, ...] = ()) -> KVCache:
        stacked = not isinstance(self.params["layers"], tuple)
        dtype = self.params["embed"]["embedding"].dtype
        return KVCache.empty(self.engine.config, rows, length=length, dtype=dtype, stacked=stacked, past=past)

    def _agreed(self, x: Array) -> Array:
        """The largest (of bools: whether any) of all that run in step. It is one for all, so loops and branches on it
        stay loops and branches under vmap, where a mapped one would turn into a choice between whole caches.
        """
        if self.axis_name is None:
            return x
        return lax.pmax(x.astype(jnp.int32), self.axis_name).astype(x.dtype)

    def _start(self) -> _State:
        total, most = len(self.tokens), self.engine.max_new_tokens
        logprob = jnp.zeros((total, most), jnp.float32) if self.engine.logprobs else None
        out = Generation(jnp.zeros((total, most), jnp.int32), jnp.zeros(total, jnp.int32), logprob)
        cache = self._cache(self.rows, 0 if self.single else self.places - self.steps)
        none = jnp.zeros(self.rows, jnp.int32)
        slots = Slots(none + total, none, none, none, none > 0)
        _ = self.past, self.order, self.count  # made here, outside of the loops
        any_row = self._agreed(self.count > 0)
        return _State((cache.k, cache.v), slots, jnp.int32(0), out, filling=any_row, more=any_row)

    def _turn(self, state: _State) -> _State:
        with jax.named_scope(FILL):
            state = lax.while_loop(lambda state: state.filling, self._fill, state)
        if self.steps:
            state = self._sized_chunk(state)
        filling = self._agreed(self._wanting(state.slots.live, state.taken))
        return state._replace(filling=filling, more=filling | self._agreed(jnp.any(state.slots.live)))

    def _wanting(self, live: Array, taken: Array) -> Array:
        """Whether so many slots are free that a prefill is due."""
        left = self.count - taken
        return (left > 0) & (self.rows - jnp.sum(live, dtype=jnp.int32) >= jnp.minimum(left, self.fill_rows))

    def _fill(self, state: _State) -> _State:
        """Prefill the next rows of the queue into free slots, as many as there are of both."""
        live, place = state.slots.live, jnp.arange(self.fill_rows, dtype=jnp.int32)
        free = self.rows - jnp.sum(live, dtype=jnp.int32)
        valid = (place < free) & (state.taken + place < self.count)
        row = jnp.where(valid, self.order[jnp.minimum(state.taken + place, len(self.tokens) - 1)], len(self.tokens))
        tokens, length = jnp.take(self.tokens, row, axis=0, mode="clip"), jnp.take(self.lengths, row, mode="clip")
        new = Slots(row, row, jnp.where(valid, length, 0), jnp.zeros_like(row), valid)
        logits, kv = self._prefill(tokens, new.length)
        new, made = self._choose(logits, new)
        out = self._record(state.out, new, jnp.zeros_like(row), jax.tree.map(lambda x: x[:, None], made))
        taken = state.taken + jnp.sum(valid, dtype=jnp.int32)
        if self.single:
            return state._replace(kv=kv, slots=new, taken=taken, out=out)
        where = jnp.where(valid, jnp.argsort(live, stable=True)[: self.fill_rows].astype(jnp.int32), self.rows)
        slots = jax.tree.map(lambda all, some: all.at[where].set(some, mode="drop"), state.slots, new)
        filling = self._agreed(self._wanting(slots.live, taken))
        return _State(_placed(state.kv, kv, where, jnp.zeros_like(row)), slots, taken, out, filling, state.more)

    def _prefill(self, tokens: Array, length: Array) -> tuple[Array, tuple[PerLayer, PerLayer]]:
        """Logits behind each row [R, V], and its keys and values at P places."""

        def of_width(width: int) -> Any:
            place = jnp.arange(width, dtype=jnp.int32)[None]
            positions = jnp.where(place < length[:, None], place + len(self.prefix), -1)
            logits, cache = self._model.apply(
                self.params,
                tokens[:, :width],
                positions=positions,
                cache=self._cache(len(tokens), width, self.past),
                logits_at=jnp.maximum(length - 1, 0),
            )
            assert cache is not None
            return logits, _resized((cache.k, cache.v), self.width)

        fits = jnp.sum(self._agreed(jnp.max(length)) > np.array(self.widths), dtype=jnp.int32)
        branches = [functools.partial(of_width, width) for width in self.widths]
        return lax.switch(fits, branches) if len(branches) > 1 else branches[0]()

    def _sized_chunk(self, state: _State) -> _State:
        """A chunk of the smallest compiled size that holds all live rows, and all slots while prompts wait."""
        live = state.slots.live
        rows = jnp.where(state.taken < self.count, self.rows, jnp.sum(live, dtype=jnp.int32))
        places = jnp.max(jnp.where(live, state.slots.length, 0))
        row = jnp.sum(self._agreed(rows) > np.array(self.row_sizes), dtype=jnp.int32)
        place = jnp.sum(self._agreed(places) > np.array(self.place_sizes), dtype=jnp.int32)
        sizes = [(rows, places) for rows in self.row_sizes for places in self.place_sizes]
        chunks = [functools.partial(self._chunk, rows=rows, places=places) for rows, places in sizes]
        return lax.switch(row * len(self.place_sizes) + place, chunks, state)

    def _chunk(self, state: _State, *, rows: int, places: int) -> _State:
        """Up to K decode steps of `rows` slots that attend the first `places` of their caches."""
        if rows == self.rows:
            where, slots, kv = jnp.arange(rows, dtype=jnp.int32), state.slots, state.kv
        else:
            where = jnp.argsort(~state.slots.live, stable=True)[:rows].astype(jnp.int32)
            slots = jax.tree.map(lambda x: x[where], state.slots)
            kv = jax.tree.map(lambda x: jnp.take(x, where, axis=x.ndim - 4), state.kv)
        place = jnp.arange(places, dtype=jnp.int32)[None]
        held = Past(*_resized(kv, places), jnp.where(place < slots.length[:, None], place + len(self.prefix), -1))
        end = self._steps(slots, (*self.past, held), state.taken)
        after = jax.tree.map(lambda all, some: all.at[where].set(some), state.slots, end.slots)
        out = self._record(state.out, end.slots, slots.made, end.made)
        kv = state.kv if self.single else _placed(state.kv, (end.cache.k, end.cache.v), where, slots.length)
        return state._replace(kv=kv, slots=after, out=out)

    def _steps(self, slots: Slots, past: tuple[Past, ...], taken: Array) -> _Chunk:
        """The loop of a chunk; it ends early where all rows have stopped or a prefill is due."""
        rows, steps = len(slots.row), self.steps
        logprob = jnp.zeros((rows, steps), jnp.float32) if self.engine.logprobs else None

        def step(chunk: _Chunk) -> _Chunk:
            index, slots = chunk.cache.index, chunk.slots
            position = jnp.where(slots.live, slots.length + len(self.prefix), -1)[:, None]
            logits, cache = self._model.apply(
                self.params, slots.token[:, None], positions=position, cache=chunk.cache.behind(past)
            )
            assert cache is not None
            slots = slots._replace(length=slots.length + slots.live.astype(jnp.int32))
            slots, new = self._choose(logits[:, 0], slots)
            made = jax.tree.map(lambda x, y: lax.dynamic_update_slice(x, y[:, None], (0, index)), chunk.made, new)
            going = self._agreed(jnp.any(slots.live)) & (index + 1 < steps)
            if len(self.tokens) > self.rows:
                going &= ~self._agreed(self._wanting(slots.live, taken))
            return _Chunk(cache.behind(()), slots, made, going)

        made = (jnp.zeros((rows, steps), jnp.int32), logprob)
        start = _Chunk(self._cache(rows, steps), slots, made, self._agreed(jnp.any(slots.live)))
        with jax.named_scope(STEPS):
            return lax.while_loop(lambda chunk: chunk.going, step, start)

    def _choose(self, logits: Array, slots: Slots) -> tuple[Slots, tuple[Array, Array | None]]:
        """Each live row's next token, and its log-probability; rows that stop live no longer."""
        token = jnp.where(slots.live, self._drawn(logits, slots), 0)
        logprob = None
        if self.engine.logprobs:
            chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
            logprob = jnp.where(slots.live, chosen, 0.0)
        made = slots.made + slots.live.astype(jnp.int32)
        stopped = jnp.any(token[:, None] == np.array(self.engine.stop_token_ids, np.int32)[None, :], axis=1)
        live = slots.live & ~stopped & (made < self.engine.max_new_tokens)
        return slots._replace(token=token, made=made, live=live), (token, logprob)

    def _drawn(self, logits: Array, slots: Slots) -> Array:
        if self.keys is None:
            return jax.vmap(lambda row: self.engine.sampler(row, None))(logits)
        keys = jnp.take(self.keys, slots.row, axis=0, mode="clip")
        return jax.vmap(self.engine.sampler)(logits, jax.vmap(jax.random.fold_in)(keys, slots.made))

    def _record(self, out: Generation, slots: Slots, begin: Array, made: tuple[Array, Array | None]) -> Generation:
        """Write down `made` [b, n], whose first are each row's tokens number `begin`."""
        place = begin[:, None] + jnp.arange(made[0].shape[1], dtype=jnp.int32)[None]
        tokens, logprob = jax.tree.map(
            lambda all, some: all.at[slots.row[:, None], place].set(some, mode="drop"), (out.tokens, out.logprob), made
        )
        return Generation(tokens, out.length.at[slots.row].set(slots.made, mode="drop"), logprob)


def _resized(kv: tuple[PerLayer, PerLayer], places: int) -> tuple[PerLayer, PerLayer]:
    """Caches cut or padded to so many places."""

    def fit(x: Array, axis: int) -> Array:
        if x.shape[axis] >= places:
            return lax.slice_in_dim(x, 0, places, axis=axis)
        return jnp.pad(x, [(0, places - x.shape[i] if i == axis else 0) for i in range(x.ndim)])

    k, v = kv
    return jax.tree.map(lambda x: fit(x, x.ndim - 1), k), jax.tree.map(lambda x: fit(x, x.ndim - 2), v)


def _placed(kv: Any, new: Any, rows: Int32[Array, " b"], begin: Int32[Array, " b"]) -> Any:
    """Caches with `new` written to some of their rows, each from its own place on; rows past the last are left out."""
    index = jnp.stack([rows, begin], axis=1)

    def write(held: Array, some: Array, axis: int) -> Array:
        if held.ndim == 5:
            return jax.vmap(functools.partial(write, axis=axis))(held, some)
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, axis)
        )
        return lax.scatter(held, index, some, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP, unique_indices=False)

    (k, v), (new_k, new_v) = kv, new
    return (
        jax.tree.map(functools.partial(write, axis=3), k, new_k),
        jax.tree.map(functools.partial(write, axis=2), v, new_v),
    )
