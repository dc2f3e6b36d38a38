"""GRPO as a method of the loop: rollouts → rewards → advantages within each prompt's group → clipped steps.

It shares model, tasks, prompts, engine, evaluation and records with ES. A step's tokens follow from the weights and
from (run seed, step, row), so a line of the log does not rebuild its step without rollouts. A run that stopped goes on
from its last checkpoint and makes the steps behind it again, with the same bits on the same mesh.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from es_jax.core import processes, rng
from es_jax.core.mesh import GROUPS, over_pop, own_rows, place, replicated
from es_jax.es.shaping import group_relative
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import WIDTH_STEP, Packing
from es_jax.generate.sampling import Temperature
from es_jax.profiling.clock import launched
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Graded, Grader, Pending
from es_jax.training.config import RunConfig
from es_jax.training.es_step import Evaluator, of_update
from es_jax.training.grpo_step import METRICS, Policy, Rows, token_weights
from es_jax.training.state import State

AT_ONCE = 4  # times the slots: rollouts that a group decodes in one call, while those of the last call are graded


@dataclasses.dataclass(frozen=True)
class Collected:
    """A step's R = prompts · n rows, those of one prompt together.

    Attributes:
      tokens, positions: int32 [R, P + N], as in `Rows`.
      counted: [R, N], which completion tokens there are.
      advantage: float32 [R].
    """

    tokens: np.ndarray
    positions: np.ndarray
    counted: np.ndarray
    advantage: np.ndarray


class GRPO:
    """Group-relative policy optimisation (arXiv 2402.03300); the objective is in `grpo_step`."""

    replayable, models = False, 1

    def __init__(self, config: RunConfig, evaluator: Evaluator, state: State, packing: Packing):
        self._config, self._state, self._packing = config, state, packing
        engine: Engine = dataclasses.replace(evaluator.engine, sampler=Temperature(config.grpo.temperature))
        self._policy = Policy(engine, evaluator.mesh, evaluator.dtype, of_update(config), config.grpo)
        prompts = config.task.prompts_per_step or config.task.train_size
        self.unit = ("rollout", prompts * config.grpo.rollouts)
        self._collected: Collected | None = None

    def collect(
        self, step: int, prompts: Sequence[Sequence[int]], grade: Grader, done: Callable[[int], None]
    ) -> tuple[Entry, list[list[Graded]]]:
        """n sampled completions of every prompt. The entry holds all rewards, those of one prompt together."""
        g, owner = self._config.grpo, [i for i in range(len(prompts)) for _ in range(self._config.grpo.rollouts)]
        calls: list[Any] = []
        own: dict[int, tuple[list[int], list[Pending]]] = {}
        for outputs, rows, tokens, length in self._rollouts(step, [prompts[i] for i in owner]):
            calls.append(outputs)
            at = [owner[row] for row in rows]
            own |= {row: ([i], [one]) for row, i, one in zip(rows, at, grade(at, tokens, length), strict=True)}
            done(len(rows))
        firsts = range(0, len(owner), g.rollouts)  # of which the samples are
        graded = [one for (one,) in grade.shared(own, texts=firsts).values()]
        done(len(owner) - len(own))  # by other processes
        rewards = np.array([one.score.reward for one in graded])
        advantage = group_relative(rewards, np.array(owner), scale=g.scale_by_std, eps=g.std_eps)
        tokens, length = _everyones(calls, len(owner))
        limit = self._policy.engine.max_prompt_tokens
        self._collected = laid_out([prompts[i] for i in owner], tokens, length, advantage, max_prompt_tokens=limit)
        entry = Entry(step, seeds=[], signs=[], paired=False, rewards=rewards.tolist(), weights=[])
        return entry, [graded[j :: g.rollouts] for j in range(g.rollouts)]

    def inside(self, entry: Entry) -> dict[str, float]:
        """Nothing."""
        return {}

    def learn(self, entry: Entry) -> dict[str, float]:
        """One optimizer step for each mini-batch of what was collected; means over the step's tokens and updates."""
        assert self._collected is not None
        rows, self._collected = self._scored(self._collected), None
        each = self._config.grpo.mini_batch * self._config.grpo.rollouts
        found = []
        for first in range(0, len(rows.tokens), each):
            piece = jax.tree.map(lambda leaf, first=first: leaf[first : first + each], rows)
            found.append(self._update(piece, each))
        values = processes.fetch(found)
        tokens = max(sum(v["tokens"] for v in values), 1)
        means = {name: float(sum(v[name] for v in values) / tokens) for name in METRICS[2:]}
        if not self._config.grpo.kl_coef:
            del means["kl"]
        norms = [float(v["gradient_norm"]) for v in values]
        loss = float(np.mean([v["loss"] for v in values]))
        return {"loss": loss, **means, "gradient_norm": float(np.mean(norms)), "gradient_norm_max": max(norms)}

    def _rollouts(self, step: int, prompts: list) -> Iterator[tuple[Any, list[int], np.ndarray, np.ndarray]]:
        """(outputs of a call, rows, tokens [B, L], length [B]), one call decoding while another is graded. In a run of
        several processes, the rows that this one's devices decode."""
        engine, mesh = self._policy.engine, self._policy.mesh
        key, groups = rng.sampling_key(self._config.train.seed, step), mesh.shape[GROUPS]
        each = min(-(-len(prompts) // groups), AT_ONCE * engine.slots)
        pending: list[tuple[int, Any]] = []
        for first in range(0, len(prompts), groups * each):
            rows = self._packing.pack(prompts[first : first + groups * each], rows=groups * each)
            index = jnp.arange(first, first + groups * each, dtype=jnp.uint32)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
            parts = (rows.tokens, rows.positions, np.asarray(jax.random.key_data(keys)))
            tokens, positions, data = place(tuple(x.reshape(groups, each, *x.shape[1:]) for x in parts), over_pop(mesh))
            placed = (
                tokens,
                positions,
                jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys)),
                place(rows.prefix, replicated(mesh)),
            )
            rolled = processes.launch(self._policy.rollout, self._state.params, *placed)
            pending.append((first, launched("decode", rolled)))
            if len(pending) > 1:
                yield _unpacked(*pending.pop(0), len(prompts))
        for item in pending:
            yield _unpacked(*item, len(prompts))

    def _scored(self, all_rows: Collected) -> Rows:
        """The rows with what the policy, before it moves, and the reference make of them, on the host."""
        size = self._policy.micro_batch
        tokens, positions = (self._cut(x, size, fill) for x, fill in ((all_rows.tokens, 0), (all_rows.positions, -1)))
        width, count = all_rows.counted.shape[1], len(all_rows.tokens)

        def score(params: Any) -> np.ndarray:
            found = launched("update", self._policy.logprobs(params, tokens, positions, width))
            return processes.fetch(found).reshape(-1, width)[:count]

        old = score(self._state.params)
        base = score(self._state.base) if self._config.grpo.kl_coef else old
        weight = np.concatenate(
            [
                token_weights(part, self._config.grpo.aggregation, max_new_tokens=self._config.decode.max_new_tokens)
                for part in np.split(all_rows.counted, self._cuts(count))
            ]
        )
        return Rows(all_rows.tokens, all_rows.positions, weight, all_rows.advantage, old, base)

    def _cuts(self, count: int) -> list[int]:
        each = self._config.grpo.mini_batch * self._config.grpo.rollouts
        return list(range(each, count, each))

    def _update(self, rows: Rows, each: int) -> dict[str, jax.Array]:
        """One optimizer step; every mini-batch has the same shape, the rest of a smaller one is not computed."""
        size, state = self._policy.micro_batch, self._state
        count = np.int32(-(-len(rows.tokens) // size))
        fills = Rows(0, -1, 0, 0, 0, 0)
        cut = Rows(*(self._cut(x, size, fill, rows=each) for x, fill in zip(rows, fills, strict=True)))
        base = state.base if self._config.optim.anchor.penalty == "none" else None
        state.params, state.opt_state, state.drift, metrics = self._policy.update(
            state.params, state.opt_state, base, cut, place(count, replicated(self._policy.mesh))
        )
        return launched("update", metrics)

    def _cut(self, x: np.ndarray, size: int, fill: int, *, rows: int | None = None) -> jax.Array:
        """[R, …] as micro-batches [M, m, …] on the devices, with rows of padding behind."""
        total = -(-max(rows or 0, len(x)) // size) * size
        padded = np.concatenate([x, np.full((total - len(x), *x.shape[1:]), fill, x.dtype)])
        return place(padded.reshape(-1, size, *x.shape[1:]), replicated(self._policy.mesh))


def _unpacked(first: int, outputs: Any, total: int) -> tuple[Any, list[int], np.ndarray, np.ndarray]:
    """A call's outputs, [G, Q, L] and [G, Q], and of them the rows of this process; row `first` is the call's first."""
    tokens, length = processes.wait(lambda: [own_rows(x) for x in outputs])
    each = outputs[1].shape[1]
    kept = {group: range(first + group * each, min(first + (group + 1) * each, total)) for group in tokens}
    made = (np.concatenate([x[group][: len(rows)] for group, rows in kept.items()]) for x in (tokens, length))
    return outputs, [row for rows in kept.values() for row in rows], *made


def _everyones(calls: Sequence[Any], total: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [R, L] and lengths [R] of all rows, whichever process decoded them."""
    found = processes.wait(lambda: processes.fetch(list(calls)))
    tokens = np.concatenate([tokens.reshape(-1, tokens.shape[-1]) for tokens, _ in found])
    return tokens[:total], np.concatenate([length.reshape(-1) for _, length in found])[:total]


def laid_out(
    prompts: Sequence[Sequence[int]],
    tokens: np.ndarray,
    length: np.ndarray,
    advantage: np.ndarray,
    *,
    max_prompt_tokens: int,
) -> Collected:
    """Prompts and their completions side by side, both padded to a multiple of 32 tokens: few programs are made.

    `max_prompt_tokens`: the longest prompt of the run, for short ones are not padded beyond it.

    >>> out = laid_out([[5, 6]], np.array([[7, 0]]), np.array([1]), np.zeros(1, np.float32), max_prompt_tokens=3)
    >>> out.tokens.tolist(), out.positions.tolist(), out.counted.tolist()
    ([[0, 5, 6, 7, 0]], [[-1, 0, 1, 2, -1]], [[True, False]])
    """
    longest = max(int(length.max()), 1)
    width = min(-(-longest // WIDTH_STEP) * WIDTH_STEP, tokens.shape[1])
    left, total = min(-(-max(map(len, prompts)) // WIDTH_STEP) * WIDTH_STEP, max_prompt_tokens), len(prompts)
    out, positions = np.zeros((total, left + width), np.int32), np.full((total, left + width), -1, np.int32)
    for row, (prompt, n) in enumerate(zip(prompts, length, strict=True)):
        start = left - len(prompt)
        out[row, start:left], out[row, left : left + n] = prompt, tokens[row, :n]
        positions[row, start : left + n] = np.arange(len(prompt) + n)
    counted = np.arange(width)[None] < length[:, None]
    return Collected(out, positions, counted, advantage)
