"""GRPO: rollouts → rewards → advantages within each prompt's group → clipped steps (Shao et al., arXiv 2402.03300).

Besides: dual clipping (Ye et al. 2020, arXiv 1912.09729), a higher upper clip as in arXiv 2503.14476, and the k3
estimator of the KL divergence (Schulman 2020). A step's tokens follow from its weights, so its line of the log does not
rebuild it: a run that stopped makes the steps after its last checkpoint again, with the same bits on the same mesh.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Integer

from es_jax.core import processes, rng
from es_jax.core.chunked_map import ceil_div, in_blocks
from es_jax.core.mesh import GROUPS, MODEL, over_groups, own_rows, replicated, to_devices
from es_jax.es.shaping import finite_rewards
from es_jax.generate.engine import Engine
from es_jax.generate.prompts import Packing, padded_width
from es_jax.generate.sampling import Temperature
from es_jax.models.sharding import param_shardings
from es_jax.models.transformer import Transformer
from es_jax.optim.chains import Chain
from es_jax.profiling.clock import timed
from es_jax.rundir.seed_log import Entry
from es_jax.scoring.grading import Grader, Pending, check_scores
from es_jax.training.config import RunConfig
from es_jax.training.config_groups import GRPOConfig
from es_jax.training.es import Evaluator, one_ahead
from es_jax.training.method import Progress, StepResult, TokenLists
from es_jax.training.state import State, optimizer_step, theta0_of

AT_ONCE = 4  # times the slots: rollouts that a group decodes in one call, while those of the last call are graded
TOKENS_AT_ONCE = 512  # tokens whose logits over the whole vocabulary are held at the same time
PerToken = Float[Array, "R N"]
METRICS = ("loss", "tokens", "kl", "entropy", "ratio", "clip_fraction", "dual_clip_fraction")


def group_relative(
    rewards: Float[np.ndarray, " n"], groups: Integer[np.ndarray, " n"], *, scale: bool = True, eps: float = 1e-6
) -> np.ndarray:
    """(r − mean) / (std + eps) within each group, ddof 1, float32 [N]: the advantage of GRPO (arXiv 2402.03300).

    `scale=False` leaves r − mean, the advantage of Dr. GRPO (arXiv 2503.20783). A group of equal rewards, or of one,
    gets zeros.

    >>> group_relative(np.array([0.0, 2.0, 5.0, 5.0]), np.array([0, 0, 1, 1])).round(2)
    array([-0.71,  0.71,  0.  ,  0.  ], dtype=float32)
    """
    rewards, groups = finite_rewards(rewards), np.asarray(groups)
    if groups.shape != rewards.shape:
        raise ValueError(f"groups have shape {groups.shape} for {len(rewards)} rewards: give each reward its group")
    out = np.zeros(len(rewards))
    for group in np.unique(groups):
        mine = groups == group
        if np.ptp(rewards[mine]) > 0:
            centred = rewards[mine] - rewards[mine].mean()
            out[mine] = centred / (rewards[mine].std(ddof=1) + eps) if scale else centred
    return out.astype(np.float32)


class Rows(NamedTuple):
    """R prompts with their completions; with leading axes where they are cut into micro-batches.

    Attributes:
      tokens, positions: int32 [R, P + N], a prompt at the right end of the first P, a completion at the left end of the
        last N; positions count on over both and are -1 at padding.
      weight: float32 [R, N], what each completion token weighs in the loss, from `token_weights`; 0 at padding.
      advantage: float32 [R].
      old, reference: float32 [R, N], log-probabilities before the step's first update, and of the starting weights.
    """

    tokens: Any
    positions: Any
    weight: Any
    advantage: Any
    old: Any
    reference: Any


PADDING = Rows(0, -1, 0, 0, 0, 0)


def token_weights(
    counted: Bool[np.ndarray, "R N"], aggregation: str, *, max_new_tokens: int
) -> Float32[np.ndarray, "R N"]:
    """What each token weighs, so that a mini-batch's loss is the weighted sum over its tokens.

    `counted` tells the tokens of its completions; a row without any is not a sequence. "token-mean": 1 / tokens.
    "seq-mean-token-sum": 1 / sequences. "seq-mean-token-mean": 1 / (sequences · tokens of the row).
    "seq-mean-token-sum-norm": 1 / (sequences · max_new_tokens), the unbiased form of Dr. GRPO (arXiv 2503.20783).

    >>> token_weights(np.array([[True, True], [True, False]]), "seq-mean-token-mean", max_new_tokens=2).tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    lengths = counted.sum(axis=1, keepdims=True)
    sequences = max(int((lengths > 0).sum()), 1)
    per_row = {
        "token-mean": max(lengths.sum(), 1),
        "seq-mean-token-sum": sequences,
        "seq-mean-token-mean": sequences * np.maximum(lengths, 1),
        "seq-mean-token-sum-norm": sequences * max_new_tokens,
    }[aggregation]
    return (counted / per_row).astype(np.float32)


def finite_rows(rows: Rows) -> Bool[np.ndarray, " R"]:
    """Of which rows the log-probabilities of all tokens that count are finite."""
    return (np.isfinite(rows.old + rows.reference) | (rows.weight == 0)).all(axis=1)


def policy_loss(
    logprob: PerToken, old: PerToken, advantage: Float[Array, " R"], grpo: GRPOConfig
) -> tuple[Array, Array, Array, Array]:
    """The clipped loss of every token, its ratio π/π_old, whether it was clipped, and whether the dual clip held.

    −min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high)A); where A < 0 no more than −cA. All [R, N].
    """
    a = jnp.broadcast_to(advantage[:, None], logprob.shape)
    ratio = jnp.exp(jnp.clip(logprob - old, -grpo.log_ratio_limit, grpo.log_ratio_limit))
    free, clipped = -a * ratio, -a * jnp.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high)
    worst, ceiling = jnp.maximum(free, clipped), -a * grpo.dual_clip
    dual = (a < 0) & (worst > ceiling)
    return jnp.where(dual, ceiling, worst), ratio, clipped > free, dual


def kl_k3(logprob: PerToken, reference: PerToken, grpo: GRPOConfig) -> PerToken:
    """exp(k) − k − 1 with k = log π_ref − log π: an unbiased estimate of KL(π ‖ π_ref), never negative."""
    k = jnp.clip(reference - logprob, -grpo.log_ratio_limit, grpo.log_ratio_limit)
    return jnp.clip(jnp.exp(k) - k - 1, -grpo.kl_limit, grpo.kl_limit)


class GRPO:
    """Group-relative policy optimisation (arXiv 2402.03300); the objective is in `Policy.loss`."""

    models = 1

    def __init__(
        self, config: RunConfig, evaluator: Evaluator, state: State, packing: Packing, streams: int = rng.STREAMS
    ):
        self._config, self._state, self._packing, self._streams = config, state, packing, streams
        engine: Engine = dataclasses.replace(evaluator.engine, sampler=Temperature(config.grpo.temperature))
        self._policy = Policy(engine, evaluator.mesh, evaluator.dtype, state.spec.chain, config.grpo)
        prompts = config.task.prompts_per_step or config.task.train_size
        self.unit = ("rollout", prompts * config.grpo.rollouts)

    def step(self, step: int, prompts: TokenLists, grade: Grader, done: Progress) -> StepResult:
        """n sampled completions of every prompt, and an optimizer step for each mini-batch of them.

        The entry holds all rewards, those of one prompt together.
        """
        g, n = self._config.grpo, self._config.grpo.rollouts
        repeated = [prompt for prompt in prompts for _ in range(n)]
        calls: list[Any] = []
        own: dict[int, tuple[list[int], list[Pending]]] = {}
        for outputs, rows, tokens, length in self._rollouts(step, repeated):
            calls.append(outputs)
            scores = grade([row // n for row in rows], tokens, length)
            own |= {row: ([row // n], [score]) for row, score in zip(rows, scores, strict=True)}
            done(len(rows))
        graded = [one for (one,) in grade.shared(own, texts=range(0, len(repeated), n)).values()]
        done(len(repeated) - len(own))  # by other processes
        check_scores(graded, self._config.task.name)
        rewards = np.array([one.score.reward for one in graded])
        advantage = group_relative(rewards, np.arange(len(rewards)) // n, scale=g.scale_by_std, eps=g.std_eps)
        outputs = processes.wait(lambda: processes.fetch(calls))  # [G, Q, L] and [G, Q] of each call
        tokens, length = (
            np.concatenate([*itertools.chain(*arrays)])[: len(repeated)] for arrays in zip(*outputs, strict=True)
        )
        limit = len(self._packing.prefix) + self._packing.width
        scored = self._scored(*side_by_side(repeated, tokens, length, max_prompt_tokens=limit), advantage)
        if wrong := [one.example.id for one, row in zip(graded, finite_rows(scored), strict=True) if not row]:
            raise ValueError(
                f"step {step}: log-probabilities of completions are not finite, of rows {', '.join(wrong[:5])}: set "
                f"model.dtype ({str(self._policy.dtype)!r}) to 'float32' or 'bfloat16', or lower optim.learning_rate "
                f"({self._config.optim.learning_rate:g})"
            )
        metrics = self._learn(scored, self._state.rates(self._config.rates(step)))
        entry = Entry(step, seeds=[], signs=[], paired=False, rewards=rewards.tolist(), weights=[])
        return entry, [graded[j::n] for j in range(n)], metrics

    def seconds_alone(self, entry: Entry) -> dict[str, float]:
        """Nothing."""
        return {}

    def _rollouts(self, step: int, prompts: list) -> Iterator[tuple[Any, list[int], np.ndarray, np.ndarray]]:
        """(outputs of a call, rows of this process, tokens [B, L], length [B]); one call decodes while the one before
        it is graded."""
        mesh = self._policy.mesh
        key = rng.sampling_key(self._config.train.seed, step, streams=self._streams)
        groups = mesh.shape[GROUPS]
        each = min(ceil_div(len(prompts), groups), AT_ONCE * self._policy.engine.slots)
        at_once = groups * each

        def calls() -> Iterator[tuple[int, Any]]:
            for first in range(0, len(prompts), at_once):
                rows = self._packing.pack(prompts[first : first + at_once], rows=at_once)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(
                    key, jnp.arange(first, first + at_once, dtype=jnp.uint32)
                )
                parts = (rows.tokens, rows.positions, np.asarray(jax.random.key_data(keys)))
                in_groups = tuple(x.reshape(groups, each, *x.shape[1:]) for x in parts)
                tokens, positions, data = to_devices(in_groups, over_groups(mesh))
                keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))
                arguments = (tokens, positions, keys, to_devices(rows.prefix, replicated(mesh)))
                yield first, timed("decode", processes.launch(self._policy.rollout, self._state.params, *arguments))

        for first, outputs in one_ahead(calls()):
            tokens, length = processes.wait(functools.partial(jax.tree.map, own_rows, outputs))
            rows = {g: range(first + g * each, min(first + (g + 1) * each, len(prompts))) for g in tokens}
            arrays = (np.concatenate([x[g][: len(own)] for g, own in rows.items()]) for x in (tokens, length))
            yield outputs, [row for own in rows.values() for row in own], *arrays

    def _scored(self, tokens: np.ndarray, positions: np.ndarray, counted: np.ndarray, advantage: np.ndarray) -> Rows:
        """The rows with their log-probabilities by the policy, before it moves, and by the reference, on the host."""
        width, count, each = counted.shape[1], len(tokens), self._policy.mini_batch
        on_devices = self._micro_batches(tokens, 0), self._micro_batches(positions, -1)

        def score(params: Any) -> np.ndarray:
            logprobs = timed("update", self._policy.logprobs(params, *on_devices, width))
            return processes.fetch(logprobs).reshape(-1, width)[:count]

        old = score(self._state.params)
        reference = score(self._state.base) if self._config.grpo.kl_coef else old
        aggregation, longest = self._config.grpo.aggregation, self._config.decode.max_new_tokens
        batches = np.split(counted, range(each, count, each))
        weight = np.concatenate([token_weights(batch, aggregation, max_new_tokens=longest) for batch in batches])
        return Rows(tokens, positions, weight, advantage, old, reference)

    def _learn(self, rows: Rows, rates: jax.Array) -> dict[str, float | None]:
        """One optimizer step for each mini-batch; means over the tokens and updates of all."""
        each, values = self._policy.mini_batch, []
        for first in range(0, len(rows.tokens), each):
            batch = [x[first : first + each] for x in rows]
            # every mini-batch has the same shape; the rest of a smaller one is not computed
            padded = Rows(*(self._micro_batches(x, fill, each) for x, fill in zip(batch, PADDING, strict=True)))
            count = np.int32(ceil_div(len(batch[0]), self._policy.micro_batch))
            count = to_devices(count, replicated(self._policy.mesh))
            values.append(timed("update", self._state.advance(self._policy.update, padded, count, rates)))
        values = processes.fetch(values)
        tokens = max(sum(v["tokens"] for v in values), 1)
        means = {name: float(sum(v[name] for v in values) / tokens) for name in METRICS[2:]}
        if not self._config.grpo.kl_coef:
            del means["kl"]
        norms = [float(v["gradient_norm"]) for v in values]
        loss = float(np.mean([v["loss"] for v in values]))
        return {"loss": loss, **means, "gradient_norm": float(np.mean(norms)), "gradient_norm_max": max(norms)}

    def _micro_batches(self, x: np.ndarray, fill: int, rows: int = 0) -> jax.Array:
        """[R, …] as micro-batches [M, m, …] on the devices, of at least so many rows: padding comes last."""
        size = self._policy.micro_batch
        total = ceil_div(max(rows, len(x)), size) * size
        padded = np.concatenate([x, np.full((total - len(x), *x.shape[1:]), fill, x.dtype)])
        return to_devices(padded.reshape(-1, size, *x.shape[1:]), replicated(self._policy.mesh))


def side_by_side(
    prompts: TokenLists, tokens: np.ndarray, length: np.ndarray, *, max_prompt_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and positions as in `Rows`, and which completion tokens there are, bool [R, N].

    Both parts are padded to a multiple of 32 tokens, so that few programs are made, but not beyond the longest prompt
    and completion of the run.

    >>> out = side_by_side([[5, 6]], np.array([[7, 0]]), np.array([1]), max_prompt_tokens=3)
    >>> [x.tolist() for x in out]
    [[[0, 5, 6, 7, 0]], [[-1, 0, 1, 2, -1]], [[True, False]]]
    """
    width = padded_width(max(int(length.max()), 1), tokens.shape[1])
    left = padded_width(max(map(len, prompts)), max_prompt_tokens)
    counted, before = np.arange(width) < length[:, None], [[0] * (left - len(prompt)) + [*prompt] for prompt in prompts]
    out = np.concatenate([before, np.where(counted, tokens[:, :width], 0)], axis=1).astype(np.int32)
    positions = np.arange(left + width) - left + np.array([*map(len, prompts)])[:, None]
    present = (positions >= 0) & np.concatenate([np.ones_like(before, bool), counted], axis=1)
    return out, np.where(present, positions, -1).astype(np.int32), counted


@dataclasses.dataclass(frozen=True)
class Policy:
    """The compiled programs of GRPO: `rollout` samples, `logprobs` scores, `update` steps. A plan lowers the same.

    The devices of the mesh share the rows of a micro-batch, and each holds a part of every master weight and moment.
    Weights are cast to `dtype` layer by layer, and each layer is computed again for its gradient, so that neither a
    whole copy of the weights nor the activations of more than one layer are held.
    """

    engine: Engine
    mesh: Mesh
    dtype: DTypeLike
    chain: Chain
    grpo: GRPOConfig

    @property
    def mini_batch(self) -> int:
        """Rows that an optimizer step learns from."""
        return self.grpo.mini_batch * self.grpo.rollouts

    @property
    def micro_batch(self) -> int:
        """Rows that are differentiated at once: grpo.micro_batch for each device, or a mini-batch where it is less."""
        devices = self.mesh.size
        return min(self.grpo.micro_batch, ceil_div(self.mini_batch, devices)) * devices

    @functools.partial(jax.jit, static_argnums=0)
    def rollout(self, params: Any, tokens: Array, positions: Array, keys: Array, prefix: Array) -> tuple[Array, Array]:
        """Sampled completions: tokens [G, Q, L] and lengths [G, Q] of prompts [G, Q, P], one part for each group.

        `prefix` [C] is as in `Prompts`. A completion depends on its prompt and its key alone.
        """

        def group(params, tokens, positions, keys, prefix):
            weights = self.engine.layout(optax.tree.cast(params, self.dtype))
            out = self.engine.decode(weights, tokens[0], positions[0], keys[0], prefix=prefix)
            return out.tokens[None], out.length[None]

        whole, apart = PartitionSpec(), PartitionSpec(GROUPS)
        parts = (whole, apart, apart, apart, whole)
        return jax.shard_map(
            group, mesh=self.mesh, in_specs=parts, out_specs=apart, axis_names={GROUPS}, check_vma=False
        )(params, tokens, positions, keys, prefix)

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def logprobs(self, params: Any, tokens: Array, positions: Array, width: int) -> Array:
        """Log-probabilities [M, m, N] of the last `width` tokens of M micro-batches of rows [M, m, P + N].

        `params` may be an anchor that is kept in host memory.
        """
        params = jax.tree.map(jax.device_put, params, param_shardings(self.mesh, params))

        def one(rows):
            return self._score(params, *self._shared(rows), width)[0]

        return jax.lax.map(one, (tokens, positions))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def update(
        self, params: Any, opt_state: Any, start: Any, rows: Rows, count: Array, rates: Array
    ) -> tuple[Any, Any, Array, dict[str, Array]]:
        """One optimizer step on a mini-batch: (params, opt_state, drift ‖θ − θ₀‖, metrics); the first two are donated.

        The first `count` of the M micro-batches in `rows` [M, m, …] hold rows; the rest are not computed. `start` and
        `rates` are as in `es_jax.training.state.update`.
        """
        gradient, sums = self.gradient(params, rows, count)
        params, opt_state = optimizer_step(self.chain, self.mesh, params, opt_state, gradient, rates)
        drift = optax.tree.norm(optax.tree.sub(params, theta0_of(self.mesh, opt_state, start)))
        return params, opt_state, drift, {**sums, "gradient_norm": optax.tree.norm(gradient)}

    def gradient(self, params: Any, rows: Rows, count: Array) -> tuple[Any, dict[str, Array]]:
        """The gradient of the mini-batch's loss, float32 and cut like the weights, and its metrics."""
        shardings = param_shardings(self.mesh, params)

        def micro(i, carry):
            piece = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), rows)
            (_, sums), gradient = jax.value_and_grad(self.loss, has_aux=True)(params, piece)
            gradient, sums = optax.tree.add(carry, (gradient, sums))
            return with_sharding_constraint(gradient, shardings), sums

        zeros = with_sharding_constraint(optax.tree.zeros_like(params, jnp.float32), shardings)
        return jax.lax.fori_loop(0, count, micro, (zeros, dict.fromkeys(METRICS, jnp.float32(0))))

    def loss(self, params: Any, rows: Rows) -> tuple[Array, dict[str, Array]]:
        """The weighted loss of one micro-batch [m, …], and METRICS: but for the loss, sums over its tokens."""
        g, rows = self.grpo, self._shared(rows)
        logprob, entropy = self._score(params, rows.tokens, rows.positions, rows.weight.shape[-1])
        policy, ratio, clipped, dual = policy_loss(logprob, rows.old, rows.advantage, g)
        kl = kl_k3(logprob, rows.reference, g)
        total = lambda x, weight=1.0: jnp.sum(jnp.where(rows.weight > 0, x, 0.0) * weight)  # noqa: E731
        loss = total(policy, rows.weight)
        loss = loss + g.kl_coef * total(kl, rows.weight) if g.kl_coef else loss
        loss = loss - g.entropy * total(entropy, rows.weight) if g.entropy else loss
        sums = map(total, (jnp.ones_like(kl), kl, entropy, ratio, *optax.tree.cast((clipped, dual), jnp.float32)))
        return loss, jax.lax.stop_gradient(dict(zip(METRICS, (loss, *sums), strict=True)))

    def _score(self, params: Any, tokens: Array, positions: Array, width: int) -> tuple[Array, Array]:
        """Log-probability and entropy of each of the last `width` tokens, float32 [m, N], at the run's temperature."""
        model = Transformer(self.engine.config)
        outer = {name: leaf for name, leaf in params.items() if name != "layers"}
        hidden, _ = model.hidden(
            {**self._gathered(outer), "layers": params["layers"]}, tokens, positions=positions, around=self._around
        )
        before, target = hidden[:, -width - 1 : -1], tokens[:, -width:]

        def score(before, target):
            logits = model.logits(self._gathered(outer), before) / self.grpo.temperature
            total = jax.nn.logsumexp(logits, axis=-1)
            chosen = jnp.take_along_axis(logits, target[..., None])[..., 0]
            return chosen - total, total - jnp.sum(jax.nn.softmax(logits) * logits, axis=-1)

        flat = before.reshape(1, -1, before.shape[-1]), target.reshape(1, -1)
        return jax.tree.map(lambda x: x.reshape(target.shape), in_blocks(score, *flat, block=TOKENS_AT_ONCE))

    def _around(self, block: Callable) -> Callable:
        """A layer whose weights are gathered and cast when it runs; it runs again for its gradient."""
        return jax.checkpoint(lambda x, layer, view, kv: block(x, self._gathered(layer), view, kv), prevent_cse=False)

    def _gathered(self, params: Any) -> Any:
        return with_sharding_constraint(optax.tree.cast(params, self.dtype), replicated(self.mesh))

    def _shared(self, rows: Any) -> Any:
        return with_sharding_constraint(rows, NamedSharding(self.mesh, PartitionSpec((GROUPS, MODEL))))
