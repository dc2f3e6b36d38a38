"""The programs of a GRPO run, lowered for devices that are not here: its own `rollout`, `logprobs` and `update`."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from es_jax.core import rng
from es_jax.core.mesh import POP, over_pop, replicated
from es_jax.generate.sampling import Temperature
from es_jax.generate.slots import Queue
from es_jax.models.config import TransformerConfig
from es_jax.planning.costs import Work, cache_bytes, decode_flops, decode_memory, matrix_weights, prefill_flops
from es_jax.planning.programs import Held, Program, Programs, _array
from es_jax.planning.topology import Topology
from es_jax.training.config import RunConfig
from es_jax.training.es_step import of_update
from es_jax.training.grpo import AT_ONCE
from es_jax.training.grpo_step import Policy, Rows


def programs_of(config: RunConfig, model: TransformerConfig, topology: Topology) -> Programs:
    """The programs of the config's method; see `Programs.of`."""
    return (GRPOPrograms if config.method == "grpo" else Programs).of(config, model, topology)


class GRPOPrograms(Programs):
    """`load`, `rollout`, `logprobs` (of the policy and of the reference) and `update`, one mini-batch's step.

    Completions are taken at their full length, so the plan's widths are the longest that a run can have.
    """

    method = "grpo"

    def __init__(self, config: RunConfig, model: TransformerConfig, mesh: Mesh):
        super().__init__(config, model, mesh)
        engine = dataclasses.replace(self.evaluator.engine, sampler=Temperature(config.grpo.temperature))
        self.policy = Policy(engine, mesh, self.evaluator.dtype, of_update(config), config.grpo)
        self.rows = self.prompts * config.grpo.rollouts
        self.tokens = self.width + config.decode.max_new

    def __iter__(self) -> Iterator[Program]:
        yield self.load()
        yield self.rollout()
        yield self.logprobs()
        yield self.update()

    def rollout(self) -> Program:
        """Completions of one call, several slotfuls a group, with the weights gathered and cast."""
        engine, new, groups = self.policy.engine, self.config.decode.max_new, self.mesh.shape[POP]
        each = min(-(-self.rows // groups), AT_ONCE * engine.slots)
        tokens = _array((groups, each, self.width), jnp.int32, over_pop(self.mesh))
        keys = _array((groups, each), rng.key(0).dtype, over_pop(self.mesh))
        prefix = _array((0,), jnp.int32, replicated(self.mesh))  # no shared prefix: a bound
        queue = Queue(engine, None, np.empty((each, self.width)), None, None, None, axis_name=None)
        size = jnp.dtype(self.config.model.dtype).itemsize
        copy = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params)) * size
        cache = cache_bytes(self.model, engine.slots * queue.places, size)
        flops = prefill_flops(self.model, each, self.width) + decode_flops(self.model, each, self.width, new)
        steps = -(-each // engine.slots) * new
        read = functools.partial(decode_memory, self.model, each, self.width, new, steps=steps, itemsize=size)
        return Program(
            "rollout",
            lambda: Policy.rollout.lower(self.policy, self.params, tokens, tokens, keys, prefix),
            times=-(-self.rows // (each * groups)),
            turns=queue.turns(),
            parts=self._held() | {"compute copy": Held(copy), "KV cache": Held(cache)},
            own=frozenset({"parameters", "compute copy", "KV cache"}),
            work=Work(flops, read(copy=self._matrices(size))),
        )

    def logprobs(self) -> Program:
        """What the policy, or the reference, makes of all rollouts."""
        count = -(-self.rows // self.policy.micro_batch)
        rows = self._micro((count,), (self.tokens,), jnp.int32)
        new = self.config.decode.max_new
        return Program(
            "logprobs",
            lambda: Policy.logprobs.lower(self.policy, self.params, rows, rows, new),
            times=2 if self.config.grpo.kl else 1,
            turns={},
            parts=self._held(),
            own=frozenset({"parameters"}),
            work=Work(self._forward(self.rows), 4.0 * count * Held.of(self.params).device),
        )

    def update(self) -> Program:
        """The gradient of one mini-batch, layers computed twice, and the optimizer's step."""
        each = self.config.grpo.mini_batch * self.config.grpo.rollouts
        count, new = -(-each // self.policy.micro_batch), self.config.decode.max_new
        micro = functools.partial(self._micro, (count,))
        tokens, numbers = micro((self.tokens,), jnp.int32), micro((new,), jnp.float32)
        rows = Rows(tokens, tokens, numbers, micro((), jnp.float32), numbers, numbers)
        held = self._held()
        total = sum(part.device + part.host for part in held.values())
        return Program(
            "update",
            lambda: Policy.update.lower(
                self.policy,
                self.params,
                self.opt_state,
                self.base,
                rows,
                _array((), jnp.int32, replicated(self.mesh)),
            ),
            times=-(-self.prompts // self.config.grpo.mini_batch),
            turns={"": count},
            parts=held,
            own=frozenset(held),
            work=Work(4 * self._forward(each), 2.0 * total + 4.0 * count * held["parameters"].device),
        )

    def _micro(self, lead: tuple[int, ...], shape: tuple[int, ...], dtype: Any) -> Any:
        return _array((*lead, self.policy.micro_batch, *shape), dtype, replicated(self.mesh))

    def _forward(self, rows: int) -> float:
        """FLOPs of one device for a forward pass of the rows, with logits for their completions alone."""
        _, head = matrix_weights(self.model)
        layers = prefill_flops(self.model, rows, self.tokens) - 2.0 * head * rows
        return (layers + 2.0 * head * rows * self.config.decode.max_new) / self.mesh.size
