"""Chooses decode.slots and decode.members_at_once from the memory of a run's devices."""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from es_jax.core import processes
from es_jax.core.chips import GIB
from es_jax.core.chunked_map import ceil_div
from es_jax.core.mesh import GROUPS, MODEL
from es_jax.es.low_rank import LowRankNoise
from es_jax.es.population import unperturbed_members
from es_jax.generate.decode_spec import LoopSizes, block_length
from es_jax.generate.engine import Engine
from es_jax.models import decode_attention
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import param_shapes
from es_jax.training.config import RunConfig
from es_jax.training.state import compute_dtype, make_noise

MOST_AT_ONCE = 256  # most members of a group in one call, if they share their weights


def prompts_of_member(config: RunConfig) -> int:
    """How many of a step's prompts each member sees."""
    dealt = config.es.prompts_per_member if config.record.perturbs else None
    return dealt or config.task.prompts_per_step or config.task.train_size


@functools.lru_cache(maxsize=64)
def pair_bytes(noise: LowRankNoise, model: TransformerConfig, dtype: jnp.dtype) -> int:
    """The bytes that a member adds if all share one copy of the weights in that dtype."""
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in param_shapes(model).items()}
    pair = jax.eval_shape(functools.partial(noise.pair, sigma=1.0), params, unperturbed_members(1)[0])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pair))


def _lane_bytes(engine: Engine, prompts: int, itemsize: int, *, lanes: int) -> int:
    """An estimate of the bytes that decoding takes on a lane in addition to its weights. These are the cache; what a
    prefill writes (in place), or the cache once more for a chunk; the widest activations of a prefill block; logits."""
    model, sizes = engine.config, LoopSizes.of(engine, prompts, engine.max_prompt_tokens, lanes=lanes)
    place = 2 * model.layers * model.kv_heads * model.head_dim * itemsize  # keys and values of one slot
    cache = sizes.slots * sizes.places * place
    beside = sizes.fill_rows * sizes.width * place if sizes.in_place else cache
    block = block_length(sizes.fill_rows, sizes.width, lanes)
    widest = 8 * sizes.fill_rows * block * max(model.mlp_dim, model.heads * sizes.width)
    return cache + beside + widest + 8 * sizes.slots * model.vocab_size


def _half_of_the_rest(config: RunConfig, model: TransformerConfig, mesh: Mesh, memory: int) -> int:
    """Half of the device memory that the weights leave free. Weights are the master weights, the anchor or θ₀, moments,
    GRPO's gradient, and the copies that members decode with."""
    sizes = {name: math.prod(shape) for name, shape in param_shapes(model).items()}
    weights, lanes = sum(sizes.values()), config.decode.members_at_once or 1
    copies = (2 if config.optim.name == "sgd" else 4) + (not config.record.perturbs)
    copied = weights * (lanes if lanes == 1 else 2 * lanes)  # with several rounds the next one's too
    if config.es.noise == "low_rank":
        copied = weights + sizes["embed/embedding"]  # its rounding error
    master = copies * weights * jnp.dtype(config.model.param_dtype).itemsize / mesh.size
    return int(memory - master - copied * compute_dtype(config).itemsize / mesh.shape[MODEL]) // 2


def members_at_once(config: RunConfig, engine: Engine, mesh: Mesh, *, memory: int | None = None) -> int:
    """decode.members_at_once if it is not set. Members that share weights take half of the device `memory` that the
    weights leave free; other members run one by one. `memory` is what devices report by default, on CPU the machine's
    memory.

    A member needs memory for its lane, for its pairs, for a copy of these in the order in which layers use them, and
    for those of the next round.
    """
    if config.es.noise != "low_rank":
        return 1
    model, noise, dtype, cut = engine.config, make_noise(config), compute_dtype(config), mesh.shape[MODEL]
    assert isinstance(noise, LowRankNoise)
    lane = _lane_bytes(engine, prompts_of_member(config), dtype.itemsize, lanes=MOST_AT_ONCE)
    each = 3 * pair_bytes(noise, model, dtype) + ceil_div(lane, cut)
    if memory is None:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())
        memory = processes.device_memory() or here
    share = ceil_div(config.es.population, mesh.shape[GROUPS])
    most = max(1, min(_half_of_the_rest(config, model, mesh, memory) // each, MOST_AT_ONCE))
    return ceil_div(share, ceil_div(share, most))  # the smallest with as many rounds: unused lanes decode padding


SLOTS = 64  # if devices do not report their memory


def choose_slots(config: RunConfig, engine: Engine, mesh: Mesh, *, memory: int | None = None) -> tuple[int, str]:
    """decode.slots if it is not set, and the reason: all of a member's prompts, a half, a third, …, whatever fits into
    half of the device `memory` that the weights leave free. `memory` is what devices report by default.

    Prompts count with decode.max_prompt_tokens tokens, so that a plan, which has no prompts, finds the same number.
    """
    memory = processes.device_memory() if memory is None else memory
    if memory is None:
        return SLOTS, f"decode.slots: {SLOTS}, since the devices do not report their memory"
    decode, prompts, lanes = config.decode, prompts_of_member(config), config.decode.members_at_once or 1
    engine = as_decoded(config, engine, mesh, lanes)
    room = max(_half_of_the_rest(config, engine.config, mesh, memory), 0)
    longest, new = decode.max_prompt_tokens, decode.max_new_tokens
    for batches in range(1, prompts + 1):
        slots = ceil_div(prompts, batches)
        engine = dataclasses.replace(engine, slots=slots, max_prompt_tokens=longest)
        needed = lanes * _lane_bytes(engine, prompts, compute_dtype(config).itemsize, lanes=lanes) // mesh.shape[MODEL]
        if needed <= room:
            break
    why = (
        f"of {longest} and {new} tokens, about {needed / GIB:.3g} GiB of a device, where half of what the weights leave"
    )
    return slots, f"decode.slots: {slots} of a member's {prompts} prompts {why} is {room / GIB:.3g} GiB"


def as_decoded(config: RunConfig, engine: Engine, mesh: Mesh, at_once: int) -> Engine:
    """The engine with which a run's members decode, so many at once on a group; not in place if they cannot."""
    if engine.writes_in_place and why_not_in_place(config, engine, mesh, at_once):
        return dataclasses.replace(engine, in_place=False, unroll=None if engine.unroll is None else False)
    return engine


def why_not_in_place(config: RunConfig, engine: Engine, mesh: Mesh, at_once: int) -> str | None:
    """Why members of a run cannot be decoded by `Engine.in_place`, in words; None if they can."""
    if not decode_attention.supports(engine.config):
        return f"heads have {engine.config.head_dim} numbers, but the attention kernel takes powers of two"
    if config.es.noise == "low_rank":
        return "members share their weights"
    if at_once > 1:
        return "a group decodes several members at once"
    return "a member is sharded over several devices" if mesh.shape[MODEL] > 1 else None
