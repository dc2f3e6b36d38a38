"""The programs of a GRPO run, for devices that are not here: `rollout`, `score` and `update` of its `Policy`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from es_jax.core import rng
from es_jax.core.chunked_map import ceil_div
from es_jax.core.mesh import GROUPS, over_pop, replicated
from es_jax.generate.sampling import Temperature
from es_jax.models.transformer import matrix_weights
from es_jax.planning.costs import Work, prefill_flops
from es_jax.planning.programs import Bytes, Program, Programs, array
from es_jax.training.grpo import AT_ONCE, Policy, Rows

_PASSES = 4  # over a layer, of an update: forward, forward again for the gradient, and twice as much backward


class PolicyPrograms(Programs):
    """As `Programs`, of a run with method="grpo"."""

    def __iter__(self) -> Iterator[Program]:
        yield self.load()
        yield self.rollout()
        yield self.score()
        yield self.update()

    @property
    def policy(self) -> Policy:
        """What the run compiles; `GRPO` makes the same."""
        evaluator, grpo = self.evaluator, self.config.grpo
        engine = dataclasses.replace(evaluator.engine, sampler=Temperature(grpo.temperature))
        return Policy(engine, self.mesh, evaluator.dtype, self.spec.chain, grpo)

    @property
    def rows(self) -> int:
        """Rollouts of an iteration."""
        return self.prompts * self.config.grpo.rollouts

    def rollout(self) -> Program:
        """The completions that the groups sample in one call."""
        groups, policy = self.mesh.shape[GROUPS], self.policy
        each = min(ceil_div(self.rows, groups), AT_ONCE * policy.engine.slots)
        keys = jax.eval_shape(lambda: jax.vmap(rng.key)(jnp.zeros(groups * each, jnp.uint32)).reshape(groups, each))
        where, prefix = over_pop(self.mesh), array((0,), jnp.int32, replicated(self.mesh))
        tokens, keys = array((groups, each, self.width), jnp.int32, where), array(keys.shape, keys.dtype, where)
        return self._completions(
            "rollout",
            lambda: Policy.rollout.lower(policy, self.params, tokens, tokens, keys, prefix),
            engine=policy.engine,
            prompts=each,
            times=ceil_div(self.rows, groups * each),
            own={"parameters"},
        )

    def score(self) -> Program:
        """Log-probabilities of all rollouts before the policy moves; again for the reference where there is one."""
        policy = self.policy
        tokens = array(self._micro(self.rows), jnp.int32, replicated(self.mesh))
        return Program(
            "score",
            lambda: Policy.logprobs.lower(policy, self.params, tokens, tokens, self.config.decode.max_new_tokens),
            times=2 if self.config.grpo.kl_coef else 1,
            turns={},
            parts=self._resident(),
            own=frozenset({"parameters"}),
            work=Work(self._forward(self.rows), Bytes.of(self.params).device * tokens.shape[0]),
        )

    def update(self) -> Program:
        """One optimizer step on a mini-batch."""
        policy, grpo, everywhere = self.policy, self.config.grpo, replicated(self.mesh)
        many = min(grpo.mini_batch, self.prompts) * grpo.rollouts
        shape = self._micro(many)
        completions = (*shape[:2], self.config.decode.max_new_tokens)
        arrays: list[Any] = [array(shape, jnp.int32, everywhere)] * 2
        arrays += [array(completions, jnp.float32, everywhere), array(shape[:2], jnp.float32, everywhere)]
        arrays += [array(completions, jnp.float32, everywhere)] * 2
        count, rates = array((), jnp.int32, everywhere), array((2,), jnp.float32, everywhere)
        resident = self._resident()
        gradient = Bytes(Bytes.of(self.params).device)
        moved = sum(part.device + part.host for part in resident.values())
        return Program(
            "update",
            lambda: Policy.update.lower(policy, self.params, self.opt_state, self.start, Rows(*arrays), count, rates),
            times=ceil_div(self.prompts, grpo.mini_batch),
            turns={"": shape[0]},
            parts=resident | {"gradient": gradient},
            own=frozenset({*resident, "gradient"}),
            work=Work(_PASSES * self._forward(many), 2.0 * moved + 3.0 * gradient.device * shape[0]),
        )

    def _micro(self, rows: int) -> tuple[int, int, int]:
        """The shape of that many rows in micro-batches, [M, m, P + L]."""
        size = self.policy.micro_batch
        return ceil_div(rows, size), size, self.width + self.config.decode.max_new_tokens

    def _forward(self, rows: int) -> float:
        """Operations of one device for one pass over rows of full length, logits of the completions among them."""
        width, new = self.width + self.config.decode.max_new_tokens, self.config.decode.max_new_tokens
        _, head = matrix_weights(self.model)
        return (prefill_flops(self.model, rows, width) + 2.0 * head * rows * (new - 1)) / self.mesh.size
