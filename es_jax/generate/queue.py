"""The device side of an engine: one program runs a queue of prompts through a fixed number of slots.

In each iteration a prefill of a fixed number of rows fills free slots from the queue. Then the live slots take up to
CHUNK decode steps, which form a chunk. A step writes to a small cache of the chunk, at one place for all slots, and
only reads the slots' own caches. After the chunk its cache is merged into them, at each slot's own end. So nothing is
copied from step to step. A chunk decodes only the slots, and attends only the places, that are in use, in a few
compiled sizes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from es_jax.generate.decode_spec import FILL, PART, STEPS, DecodeSpec, LoopSizes, block_length
from es_jax.generate.score import token_logprobs
from es_jax.models.cache import KVCache, Past, PerLayer, RowCache
from es_jax.models.transformer import Transformer

KV = tuple[PerLayer, PerLayer]
Chosen = tuple[Array, Array | None]  # tokens, and their log-probabilities if asked for


class Generation(NamedTuple):
    """What `Engine` generated for Q prompts.

    Attributes:
      tokens: int32 [Q, L], the completions, each with its stop token and zeros after that. L is `max_new_tokens`.
      length: int32 [Q], how many tokens of each row count, 0..L. A row shorter than L, or one whose last token is a
        stop token, ended by itself. Another was cut at L.
      logprob: float32 [Q, L], each token's log-probability in nats, under the model at temperature 1. None unless the
        engine has `logprobs=True`.

    Examples:
      >>> import numpy as np
      >>> out = Generation(np.array([[5, 7, 0]]), np.array([2]), None)
      >>> out.tokens[0, : out.length[0]].tolist()
      [5, 7]
    """

    tokens: Int32[Array, "Q L"]
    length: Int32[Array, " Q"]
    logprob: Float32[Array, "Q L"] | None


class Queue(NamedTuple):
    """The values that are constant over all iterations of the loops."""

    spec: DecodeSpec
    sizes: LoopSizes
    model: Transformer
    params: Any
    tokens: Array  # [Q, P]
    keys: Array | None  # [Q]
    limits: Array | int  # tokens after which a completion is cut, for each prompt or for all
    axis_name: str | None
    lengths: Array  # [Q], tokens of each prompt after the prefix; 0 for padding
    total: Array  # number of prompts
    order: Array  # [Q], the order of taking prompts: longest first, so that those filled together are alike
    past: tuple[Past, ...]  # the prefix, computed once for all prompts
    shared: int  # tokens of the prefix
    filled: bool  # whether the only prefill has been done

    def agree(self, x: Array) -> Array:
        """The maximum over the lanes of a vmap (for bools: any). A value shared by all lanes keeps loops and branches;
        a value per lane would turn them into selects between whole caches."""
        return _over_lanes(x, self.axis_name)


class _Slots(NamedTuple):
    """The prompts being decoded, one for each slot: integers [B]."""

    prompt: Array  # its index in the queue; Q for an empty slot
    token: Array  # the last chosen token, not yet fed
    length: Array  # tokens in the slot's cache, without those of the prefix
    generated: Array  # how many tokens
    live: Array  # bool


class State(NamedTuple):
    kv: Any  # the slots' caches
    slots: _Slots
    taken: Array  # prompts taken from the queue
    out: Generation
    filling: Array  # whether to fill slots; equal on all lanes, like `more`
    more: Array  # whether anything is left to do


class _Chunk(NamedTuple):
    number: Array  # of the next step
    cache: Any  # the chunk's cache; if steps write in place, the slots' keys and values
    slots: _Slots
    chosen: Chosen  # [b, K]
    going: Array


class _Decoded(NamedTuple):
    """The result of a chunk: everything except the slots' caches, and what must be written to them."""

    state: State  # without its caches, which are None
    kv: KV  # [B, ...] keys and values of the chunk
    slot: Array  # [B], the slot of each row; B for no slot
    begin: Array  # [B], the first place to write to


class Filled(NamedTuple):
    """The result of a prefill of all prompts, only arrays; `decode_queue` continues from it."""

    past: tuple[Past, ...]
    state: State


def decode_queue(queue: Queue, state: State) -> Generation:
    """Decode all prompts of a queue from `begin_queue`."""
    sizes = queue.sizes
    if not sizes.single:
        return lax.while_loop(lambda state: state.more, partial(_turn, queue), state).out
    state = state if queue.filled else fill_queue(queue, state).state
    return _chunk(queue, state, slots=sizes.slots, places=sizes.width).state.out if sizes.steps else state.out


def fill_queue(queue: Queue, state: State) -> Filled:
    """The only prefill of `decode_queue` (`LoopSizes.single`), perhaps for only some of its lanes."""
    with jax.named_scope(FILL):
        return Filled(queue.past, _fill(queue, state))


def begin_queue(
    spec: DecodeSpec,
    params: Any,
    tokens: Array,
    positions: Array,
    keys: Array | None,
    prefix: Array,
    axis_name: str | None,
    *,
    limits: Array | None = None,
    filled: Filled | None = None,
) -> tuple[Queue, State]:
    """The queue for `fill_queue` and `decode_queue`: the shared prefix is prefilled, and no slot has a prompt.

    `Engine.decode` describes the arguments. `limits` [Q] replace max_new_tokens. With `filled`, which `fill_queue`
    returned for the same arguments, neither the prefix nor the prompts are prefilled again.
    """
    sizes, model = LoopSizes.of(spec, *tokens.shape, lanes=_lanes(axis_name)), Transformer(spec.config)
    lengths = jnp.sum(positions >= 0, axis=1)
    total = _count(lengths > 0)
    order = jnp.argsort(-lengths)  # JAX's sort is stable
    past: tuple[Any, ...] = () if filled is None else filled.past
    if len(prefix) and filled is None:
        places, last = jnp.arange(len(prefix))[None], jnp.int32([len(prefix) - 1])
        with jax.named_scope(FILL):
            past = (_hidden(model, params, prefix[None], places, last, (), axis_name)[1],)
    limit = spec.max_new_tokens if limits is None else limits
    queue = Queue(
        spec, sizes, model, params, tokens, keys, limit, axis_name, lengths, total, order, past, len(prefix),
        filled=filled is not None,
    )  # fmt: skip
    if filled is not None:
        return queue, filled.state
    cache = model.empty_cache(params, sizes.slots, sizes.own_places)
    shape, none = (sizes.prompts, spec.max_new_tokens), jnp.zeros(sizes.slots, jnp.int32)
    logprob = jnp.zeros(shape, jnp.float32) if spec.logprobs else None
    out = Generation(jnp.zeros(shape, jnp.int32), jnp.zeros(sizes.prompts, jnp.int32), logprob)
    any_prompt = queue.agree(total > 0)
    slots = _Slots(none + sizes.prompts, none, none, none, none > 0)
    return queue, State(cache.kv, slots, jnp.int32(0), out, filling=any_prompt, more=any_prompt)


def _over_lanes(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else lax.pmax(x.astype(jnp.int32), axis_name).astype(x.dtype)


def _lanes(axis_name: str | None) -> int:
    return 1 if axis_name is None else lax.axis_size(axis_name)


def _count(flags: Array) -> Array:
    return jnp.sum(flags, dtype=jnp.int32)


def _turn(queue: Queue, state: State) -> State:
    with jax.named_scope(FILL):
        state = lax.while_loop(lambda state: state.filling, partial(_fill, queue), state)
    if queue.sizes.steps:
        state = (_chunk_in_place if queue.sizes.in_place else _sized_chunk)(queue, state)
    filling = queue.agree(_fill_is_due(queue, state.slots.live, state.taken))
    return state._replace(filling=filling, more=filling | queue.agree(jnp.any(state.slots.live)))


def _fill_is_due(queue: Queue, live: Array, taken: Array) -> Array:
    """Whether enough slots are free for a prefill."""
    left, sizes = queue.total - taken, queue.sizes
    return (left > 0) & (sizes.slots - _count(live) >= jnp.minimum(left, sizes.fill_rows))


def _fill(queue: Queue, state: State) -> State:
    """Prefill the next prompts of the queue into free slots."""
    sizes, live, row = queue.sizes, state.slots.live, jnp.arange(queue.sizes.fill_rows)
    valid = (row < sizes.slots - _count(live)) & (state.taken + row < queue.total)
    prompt = jnp.where(valid, queue.order[jnp.minimum(state.taken + row, sizes.prompts - 1)], sizes.prompts)
    tokens, length = (jnp.take(x, prompt, axis=0, mode="clip") for x in (queue.tokens, queue.lengths))
    none = jnp.zeros_like(prompt)
    new = _Slots(prompt, prompt, jnp.where(valid, length, 0), none, valid)
    logits, kv = _prefill(queue, tokens, new.length)
    new, chosen = _choose(queue, logits, new)
    out = _record(state.out, new, none, jax.tree.map(lambda x: x[:, None], chosen))
    taken = state.taken + _count(valid)
    if sizes.single:
        return state._replace(kv=kv, slots=new, taken=taken, out=out)
    slot = jnp.where(valid, jnp.argsort(live)[: sizes.fill_rows], sizes.slots)
    slots = jax.tree.map(lambda all, some: all.at[slot].set(some), state.slots, new)
    filling = queue.agree(_fill_is_due(queue, slots.live, taken))
    return State(_written(state.kv, kv, slot, none), slots, taken, out, filling, state.more)


def _prefill(queue: Queue, tokens: Array, length: Array) -> tuple[Array, KV]:
    """Logits after each row [R, V], and its keys and values at P places."""
    widths, model = queue.sizes.widths, queue.model

    def of_width(width: int) -> Any:
        place = jnp.arange(width)[None]
        positions = jnp.where(place < length[:, None], place + queue.shared, -1)
        at = jnp.maximum(length - 1, 0)
        hidden, cache = _hidden(model, queue.params, tokens[:, :width], positions, at, queue.past, queue.axis_name)
        return model.logits(queue.params, hidden)[:, 0], _resized(cache.kv, queue.sizes.width)

    size = _count(queue.agree(jnp.max(length)) > np.array(widths))
    return lax.switch(size, [partial(of_width, width) for width in widths])


def _hidden(
    model: Transformer, params: Any, tokens: Array, positions: Array, at: Array, past: tuple[Past, ...],
    axis_name: str | None,
) -> tuple[Array, KVCache]:  # fmt: skip
    """The hidden state of token `at` in each row [R, 1, D], and the cache of all tokens.

    Several lanes take a block of tokens at a time, since the memory for a token is needed on each lane.
    """
    rows, width = tokens.shape
    block = block_length(rows, width, _lanes(axis_name))
    padding = [(0, 0), (0, -width % block)]
    tokens, positions = jnp.pad(tokens, padding), jnp.pad(positions, padding, constant_values=-1)

    def part(first: Array | int, past: tuple[Past, ...]) -> tuple[Array, KVCache]:
        own, places = (lax.dynamic_slice_in_dim(x, first, block, axis=1) for x in (tokens, positions))
        cache = model.empty_cache(params, rows, block, past=past)
        hidden, cache = model.hidden(params, own, positions=places, cache=cache)  # type: ignore[assignment]
        place = jnp.clip(at - first, 0, block - 1)
        return jnp.take_along_axis(hidden, place[:, None, None], axis=1), dataclasses.replace(cache, past=())

    if block == width:
        return part(0, past)

    def turn(i: Array, state: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        new, own = part(i * block, (*past, state[1]))
        hidden = jnp.where((at // block == i)[:, None, None], new, state[0])
        return hidden, _extended(state[1], own, new, axis_name)

    start = jnp.zeros((rows, 1, model.config.width), params["embed"]["embedding"].dtype)
    with jax.named_scope(PART):
        turns = lax.pmax(jnp.max(at), axis_name) // block + 1
        return lax.fori_loop(0, turns, turn, (start, model.empty_cache(params, *tokens.shape)))


def _extended(cache: KVCache, own: KVCache, result: Array, axis_name: str | None) -> KVCache:
    """The cache with the content of `own`, written only after a result that needed both exists. Otherwise compilers for
    CPUs copy the cache, because they cannot tell that it was read before."""
    index = _after(result, cache.index, axis_name)
    return dataclasses.replace(cache, index=index).extended(*own.kv, own.positions)


def _after(result: Array, number: Array, axis_name: str | None) -> Array:
    """The number, in a form that no compiler can know before the result exists."""
    there = _over_lanes(jnp.any(result > 0), axis_name).astype(jnp.int32)
    return jnp.minimum(number, number + there)


def _sized_chunk(queue: Queue, state: State) -> State:
    """A chunk of the smallest compiled size that holds all live slots; it takes all slots while prompts wait."""
    sizes, live = queue.sizes, state.slots.live
    slots = jnp.where(state.taken < queue.total, sizes.slots, _count(live))
    places = jnp.max(jnp.where(live, state.slots.length, 0))
    i, j = (
        _count(queue.agree(used) > np.array(compiled))
        for used, compiled in ((slots, sizes.slot_sizes), (places, sizes.place_sizes))
    )
    branches = [partial(_chunk, queue, slots=b, places=s) for b in sizes.slot_sizes for s in sizes.place_sizes]
    end = lax.switch(i * len(sizes.place_sizes) + j, branches, state)
    return end.state._replace(kv=_written(state.kv, end.kv, end.slot, end.begin))


def _chunk(queue: Queue, state: State, *, slots: int, places: int) -> _Decoded:
    """Up to K decode steps of so many slots, which attend the first `places` of their caches. It only reads the caches:
    a branch that returned them would copy them."""
    whole = slots == queue.sizes.slots
    if whole:
        slot, begin, kv = jnp.arange(slots), state.slots, state.kv
    else:
        slot = jnp.argsort(~state.slots.live)[:slots]
        begin = jax.tree.map(lambda x: x[slot], state.slots)
        kv = jax.tree.map(lambda x: jnp.take(x, slot, axis=-4), state.kv)
    place = jnp.arange(places)[None]
    past = Past(*_resized(kv, places), jnp.where(place < begin.length[:, None], place + queue.shared, -1))
    end = _steps_beside(queue, begin, (*queue.past, past), state.taken)
    after = end.slots
    if not whole:
        after = jax.tree.map(lambda all, some: all.at[slot].set(some), state.slots, after)
    out = _record(state.out, end.slots, begin.generated, end.chosen)
    more = queue.sizes.slots - slots
    kv = jax.tree.map(lambda x: jnp.pad(x, [(0, more if i == x.ndim - 4 else 0) for i in range(x.ndim)]), end.cache.kv)
    slot, begins = jnp.pad(slot, (0, more), constant_values=queue.sizes.slots), jnp.pad(begin.length, (0, more))
    return _Decoded(state._replace(kv=None, slots=after, out=out), kv, slot, begins)


def _chunk_in_place(queue: Queue, state: State) -> State:
    """Like `_sized_chunk`, with steps that write to the slots' caches and attend only their live places."""

    def step(kv: Any, slots: _Slots, position: Array) -> tuple[Array, Callable[[_Slots], KV]]:
        keys, values = kv
        cache = RowCache(keys, values, slots.length, queue.past)
        logits, cache = queue.model.apply(queue.params, slots.token[:, None], positions=position, cache=cache)  # type: ignore[assignment]
        return logits, lambda slots: cache.kv

    end = _steps(queue, state.slots, state.kv, step, state.taken)
    out = _record(state.out, end.slots, state.slots.generated, end.chosen)
    return state._replace(kv=end.cache, slots=end.slots, out=out)


def _steps_beside(queue: Queue, slots: _Slots, past: tuple[Past, ...], taken: Array) -> _Chunk:
    """The loop of a chunk whose steps write to the chunk's cache."""
    model = queue.model
    zero = _after(slots.token, jnp.int32(0), queue.axis_name)  # else the cache would exist while the prefill runs
    cache = model.empty_cache(queue.params, len(slots.prompt), queue.sizes.steps)

    def step(cache: KVCache, slots: _Slots, position: Array) -> tuple[Array, Callable[[_Slots], KVCache]]:
        own = model.empty_cache(queue.params, len(position), 1, past=(*past, cache))
        logits, own = model.apply(queue.params, slots.token[:, None], positions=position, cache=own)  # type: ignore[assignment]
        return logits, lambda slots: _extended(cache, own, slots.token, queue.axis_name)

    return _steps(queue, slots, jax.tree.map(lambda x: x + zero.astype(x.dtype), cache), step, taken)


def _steps(queue: Queue, slots: _Slots, cache: Any, forward: Callable[..., Any], taken: Array) -> _Chunk:
    """The loop of a chunk; it ends early if all slots have stopped or a prefill is due. `forward(cache, slots,
    position)` returns a step's logits and the cache after it."""
    sizes, shape = queue.sizes, (len(slots.prompt), queue.sizes.steps)

    def step(chunk: _Chunk) -> _Chunk:
        number, slots = chunk.number, chunk.slots
        position = jnp.where(slots.live, slots.length + queue.shared, -1)[:, None]
        logits, extended = forward(chunk.cache, slots, position)
        slots = slots._replace(length=slots.length + slots.live.astype(jnp.int32))
        slots, new = _choose(queue, logits[:, 0], slots)
        chosen = jax.tree.map(lambda x, y: lax.dynamic_update_slice(x, y[:, None], (0, number)), chunk.chosen, new)
        going = queue.agree(jnp.any(slots.live)) & (number + 1 < sizes.steps)
        if sizes.prompts > sizes.slots:
            going &= ~queue.agree(_fill_is_due(queue, slots.live, taken))
        return _Chunk(number + 1, extended(slots), slots, chosen, going)

    logprob = jnp.zeros(shape, jnp.float32) if queue.spec.logprobs else None
    start = _Chunk(jnp.int32(0), cache, slots, (jnp.zeros(shape, jnp.int32), logprob), queue.agree(jnp.any(slots.live)))
    with jax.named_scope(STEPS):
        return lax.while_loop(lambda chunk: chunk.going, step, start)


def _choose(queue: Queue, logits: Array, slots: _Slots) -> tuple[_Slots, Chosen]:
    """Choose each live slot's next token and its log-probability; slots that stop are no longer live."""
    spec, logprob = queue.spec, None
    if queue.keys is None:
        token = jax.vmap(lambda row: spec.sampler(row, None))(logits)
    else:
        keys = jnp.take(queue.keys, slots.prompt, axis=0, mode="clip")
        token = jax.vmap(spec.sampler)(logits, jax.vmap(jax.random.fold_in)(keys, slots.generated))
    token = jnp.where(slots.live, token, 0)
    if spec.logprobs:
        logprob = jnp.where(slots.live, token_logprobs(logits, token), 0.0)
    generated = slots.generated + slots.live.astype(jnp.int32)
    stopped = jnp.isin(token, np.array(spec.stop_token_ids, np.int32))
    limit = queue.limits if isinstance(queue.limits, int) else jnp.take(queue.limits, slots.prompt, mode="clip")
    live = slots.live & ~stopped & (generated < limit)
    return slots._replace(token=token, generated=generated, live=live), (token, logprob)


def _record(out: Generation, slots: _Slots, begin: Array, chosen: Chosen) -> Generation:
    """Store `chosen` [b, n], whose first column is token `begin` of each prompt; entries out of range are dropped."""
    number = begin[:, None] + jnp.arange(chosen[0].shape[1])[None]
    write = lambda all, some: all.at[slots.prompt[:, None], number].set(some)  # noqa: E731
    tokens, logprob = jax.tree.map(write, (out.tokens, out.logprob), chosen)
    return Generation(tokens, out.length.at[slots.prompt].set(slots.generated), logprob)


def _map_kv(function: Callable[..., Array], *caches: KV) -> KV:
    """`function(*arrays, axis)` applied to keys and to values in all layers; `axis` is the axis of places, from the
    end."""
    keys, values = zip(*caches, strict=True)
    return jax.tree.map(partial(function, axis=-1), *keys), jax.tree.map(partial(function, axis=-2), *values)


def _resized(kv: KV, places: int) -> KV:
    """Caches truncated or padded to so many places."""

    def fit(x: Array, axis: int) -> Array:
        more = places - x.shape[axis]
        if more <= 0:
            return lax.slice_in_dim(x, 0, places, axis=axis)
        return jnp.pad(x, [(0, more if i == x.ndim + axis else 0) for i in range(x.ndim)])

    return _map_kv(fit, kv)


def _written(kv: Any, new: Any, slots: Array, begin: Array) -> Any:
    """Caches with `new` written to some of their slots, each from its own place on; rows without a slot are dropped."""
    index = jnp.stack([slots, begin], axis=1)

    def write(whole: Array, some: Array, axis: int) -> Array:
        if whole.ndim == 5:
            return jax.vmap(partial(write, axis=axis))(whole, some)
        numbers = lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 4 + axis)
        )
        return lax.scatter(whole, index, some, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)

    return _map_kv(write, kv, new)
