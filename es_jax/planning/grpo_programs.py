"""The programs of a GRPO run, for absent devices: `rollout`, `score` and `update` of its `Policy`."""

import dataclasses

import jax.numpy as jnp

from es_jax.core import rng
from es_jax.core.chunked_map import ceil_div
from es_jax.core.mesh import GROUPS, over_groups
from es_jax.generate.sampling import Temperature
from es_jax.planning.costs import Work, forward_flops
from es_jax.planning.programs import Bytes, Program, Programs, array
from es_jax.training.grpo import AT_ONCE, Policy, Rows

_PASSES = 4  # cost of an update per layer: forward, forward again for the gradient, and backward, which counts twice


class PolicyPrograms(Programs):
    """Like `Programs`, for a run with method="grpo"."""

    order = ("load", "rollout", "score", "update")

    @property
    def policy(self) -> Policy:
        """The policy that the run compiles; `GRPO` makes the same."""
        evaluator, grpo = self.evaluator, self.config.grpo
        engine = dataclasses.replace(evaluator.engine, sampler=Temperature(grpo.temperature))
        return Policy(engine, self.mesh, evaluator.dtype, self.spec.chain, grpo)

    def rollout(self) -> Program:
        """The completions that the groups sample in one call."""
        groups, policy, rows = self.mesh.shape[GROUPS], self.policy, self.prompts * self.config.grpo.rollouts
        each = min(ceil_div(rows, groups), AT_ONCE * policy.engine.slots)
        where, prefix = over_groups(self.mesh), array((0,), jnp.int32, self.everywhere)
        tokens = array((groups, each, self.width), jnp.int32, where)
        keys = array((groups, each), rng.key(0).dtype, where)
        return self._completions(
            "rollout", lambda: Policy.rollout.lower(policy, self.params, tokens, tokens, keys, prefix),
            prompts=each, times=ceil_div(rows, groups * each), own={"parameters"},
        )  # fmt: skip

    def score(self) -> Program:
        """Log-probabilities of all rollouts before the policy moves, and again for the reference if there is one."""
        rows = self.prompts * self.config.grpo.rollouts
        tokens = array(self._micro_batches(rows), jnp.int32, self.everywhere)
        return Program(
            "score",
            lambda: Policy.logprobs.lower(self.policy, self.params, tokens, tokens, self.new),
            times=2 if self.config.grpo.kl_coef else 1,
            parts=self.resident,
            own={"parameters"},
            work=Work(self._forward(rows), self.resident["parameters"].device * tokens.shape[0]),
        )

    def update(self) -> Program:
        """One optimizer step on a mini-batch."""
        grpo = self.config.grpo
        rows = min(grpo.mini_batch, self.prompts) * grpo.rollouts
        shape = self._micro_batches(rows)
        tokens = array(shape, jnp.int32, self.everywhere)
        advantage = array(shape[:2], jnp.float32, self.everywhere)
        of_tokens = array((*shape[:2], self.new), jnp.float32, self.everywhere)
        batch = Rows(tokens, tokens, of_tokens, advantage, of_tokens, of_tokens)
        arguments = self.start, batch, array((), jnp.int32, self.everywhere), self.rates
        gradient = Bytes(self.resident["parameters"].device)
        parts = self.resident | {"gradient": gradient}
        moved = sum(sum(part) for part in self.resident.values())
        return Program(
            "update",
            lambda: Policy.update.lower(self.policy, self.params, self.opt_state, *arguments),
            times=ceil_div(self.prompts, grpo.mini_batch),
            parts=parts,
            own=parts.keys(),
            work=Work(_PASSES * self._forward(rows), 2.0 * moved + 3.0 * gradient.device * shape[0]),
            turns={"": shape[0]},
        )

    def _micro_batches(self, rows: int) -> tuple[int, int, int]:
        """The shape of that many rows in micro-batches, [M, m, P + L]."""
        size = self.policy.micro_batch
        return ceil_div(rows, size), size, self.width + self.new

    def _forward(self, rows: int) -> float:
        """Operations of one device for one pass over rows of full length, including the logits of the completions."""
        return forward_flops(self.model, rows, self.width + self.new, logits=self.new) / self.mesh.size
