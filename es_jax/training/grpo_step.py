"""The device side of GRPO: what the loss is, token by token, and the programs that score, differentiate and step.

Source of the objective: Shao et al. 2024, arXiv 2402.03300 (groups, clipped ratio, KL in the loss), with dual clipping
(Ye et al. 2020, arXiv 1912.09729), a higher upper clip as in arXiv 2503.14476, and the k3 estimator of the KL
divergence (Schulman 2020).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32

from es_jax.core.mesh import GROUPS, MODEL, replicated
from es_jax.generate.engine import Engine
from es_jax.models.sharding import param_shardings
from es_jax.models.transformer import Transformer
from es_jax.training.config import RunConfig
from es_jax.training.es_step import start_of, stepped
from es_jax.training.fields import GRPOConfig

TOKENS_AT_ONCE = 512  # tokens whose logits over the whole vocabulary are held at the same time
METRICS = ("loss", "tokens", "kl", "entropy", "ratio", "clip_fraction", "dual_clip_fraction")


class Rows(NamedTuple):
    """Prompts with their completions, R rows; with leading axes where they are cut into micro-batches.

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


def token_weights(
    counted: Bool[np.ndarray, "R N"], aggregation: str, *, max_new_tokens: int
) -> Float32[np.ndarray, "R N"]:
    """What each token weighs, so that a mini-batch's loss is the weighted sum over its tokens.

    Args:
      counted: the tokens of the mini-batch's completions. A row without any is no sequence.
      aggregation: "token-mean": 1 / tokens. "seq-mean-token-sum": 1 / sequences. "seq-mean-token-mean":
        1 / (sequences · tokens of the row). "seq-mean-token-sum-norm": 1 / (sequences · max_new_tokens), the unbiased form of
        Dr. GRPO (arXiv 2503.20783).
      max_new_tokens: the longest completion allowed.

    >>> token_weights(np.array([[True, True], [True, False]]), "seq-mean-token-mean", max_new_tokens=2).tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    lengths = counted.sum(axis=1, keepdims=True)
    sequences = max((lengths > 0).sum(), 1)
    per_row = {
        "token-mean": np.full(lengths.shape, max(lengths.sum(), 1)),
        "seq-mean-token-sum": np.full(lengths.shape, sequences),
        "seq-mean-token-mean": sequences * np.maximum(lengths, 1),
        "seq-mean-token-sum-norm": np.full(lengths.shape, sequences * max_new_tokens),
    }[aggregation]
    return (counted / per_row).astype(np.float32)


def policy_loss(
    logprob: Float[Array, "R N"], old: Float[Array, "R N"], advantage: Float[Array, " R"], grpo: GRPOConfig
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


def kl_k3(logprob: Float[Array, "R N"], reference: Float[Array, "R N"], grpo: GRPOConfig) -> Float[Array, "R N"]:
    """exp(k) − k − 1 with k = log π_ref − log π: an unbiased estimate of KL(π ‖ π_ref), never negative."""
    k = jnp.clip(reference - logprob, -grpo.log_ratio_limit, grpo.log_ratio_limit)
    return jnp.clip(jnp.exp(k) - k - 1, -grpo.kl_limit, grpo.kl_limit)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The compiled programs of GRPO, for one model on one mesh; each can be lowered from shapes alone.

    `rollout` samples, `logprobs` scores, `update` steps: `Policy.update.lower(policy, params, …)` with
    `jax.ShapeDtypeStruct`s is what a plan compiles.

    Attributes:
      engine: of the rollouts; it holds the model's config and a sampler.
      mesh: its devices share the rows of a micro-batch, and each holds a part of every master weight and moment.
      dtype: what the model computes in. Weights are cast layer by layer, and each layer is computed again for its
        gradient, so that neither a whole copy of the weights nor the activations of more than one layer are held.
      config: of `es_step.of_update`: what the optimizer needs.
      grpo: its fields.
    """

    engine: Engine
    mesh: Mesh
    dtype: jnp.dtype
    config: RunConfig
    grpo: GRPOConfig

    @property
    def micro_batch(self) -> int:
        """Rows that are differentiated at once: grpo.micro_batch for each device, or a mini-batch where it is less."""
        devices, rows = self.mesh.size, self.grpo.mini_batch * self.grpo.rollouts
        return min(self.grpo.micro_batch, -(-rows // devices)) * devices

    @functools.partial(jax.jit, static_argnums=0)
    def rollout(self, params: Any, tokens: Array, positions: Array, keys: Array, prefix: Array) -> tuple[Array, Array]:
        """Sampled completions: tokens [G, Q, L] and lengths [G, Q] of prompts [G, Q, P], one part for each group.

        All prompts begin with `prefix` [C], which `tokens` leaves out, as in `Prompts`. A completion depends on its
        prompt and its key alone.
        """

        def group(params, tokens, positions, keys, prefix):
            weights = self.engine.layout(jax.tree.map(lambda leaf: leaf.astype(self.dtype), params))
            out = self.engine.decode(weights, tokens[0], positions[0], keys[0], prefix=prefix)
            return out.tokens[None], out.length[None]

        parts = (PartitionSpec(), *(PartitionSpec(GROUPS),) * 3, PartitionSpec())
        return jax.shard_map(
            group, mesh=self.mesh, in_specs=parts, out_specs=PartitionSpec(GROUPS), axis_names={GROUPS}, check_vma=False
        )(params, tokens, positions, keys, prefix)

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def logprobs(self, params: Any, tokens: Array, positions: Array, width: int) -> Array:
        """Log-probabilities [M, m, N] of the last `width` tokens of M micro-batches of rows [M, m, P + N].

        `params` may be an anchor that is kept in host memory.
        """
        params = jax.tree.map(jax.device_put, params, param_shardings(self.mesh, params))

        def one(rows: tuple[Array, Array]) -> Array:
            tokens, positions = self._shared(rows)
            return self._score(params, tokens, positions, width)[0]

        return jax.lax.map(one, (tokens, positions))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def update(
        self, params: Any, opt_state: Any, base: Any, rows: Rows, count: Array
    ) -> tuple[Any, Any, Array, dict[str, Array]]:
        """One optimizer step on a mini-batch: (params, opt_state, drift ‖θ − θ₀‖, metrics).

        Args:
          params, opt_state: float32; donated.
          base: θ₀, or None where the optimizer's anchor is θ₀.
          rows: [M, m, …].
          count: how many of the M micro-batches hold rows; the rest are not computed.
        """
        (gradient, sums) = self.gradient(params, rows, count)
        params, opt_state = stepped(self.config, self.mesh, params, opt_state, gradient)
        drift = _norm(jax.tree.map(jnp.subtract, params, start_of(self.mesh, opt_state, base)))
        return params, opt_state, drift, {**sums, "gradient_norm": _norm(gradient)}

    def gradient(self, params: Any, rows: Rows, count: Array) -> tuple[Any, dict[str, Array]]:
        """The gradient of the mini-batch's loss, float32 and cut like the weights, and its metrics."""
        shardings = param_shardings(self.mesh, params)

        def micro(i: Array, carry: tuple) -> tuple:
            piece = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), rows)
            (_, sums), gradient = jax.value_and_grad(self.loss, has_aux=True)(params, piece)
            total = jax.tree.map(jnp.add, carry, (gradient, sums))
            return jax.lax.with_sharding_constraint(total[0], shardings), total[1]

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        start = (jax.lax.with_sharding_constraint(zeros, shardings), dict.fromkeys(METRICS, jnp.float32(0)))
        return jax.lax.fori_loop(0, count, micro, start)

    def loss(self, params: Any, rows: Rows) -> tuple[Array, dict[str, Array]]:
        """The weighted loss of one micro-batch [m, …], and METRICS: but for the loss, sums over its tokens."""
        g, rows = self.grpo, self._shared(rows)
        logprob, entropy = self._score(params, rows.tokens, rows.positions, rows.weight.shape[-1])
        policy, ratio, clipped, dual = policy_loss(logprob, rows.old, rows.advantage, g)
        kl = kl_k3(logprob, rows.reference, g)
        mean = lambda x: jnp.sum(jnp.where(rows.weight > 0, x, 0.0) * rows.weight)  # noqa: E731
        loss = mean(policy)
        loss = loss + g.kl_coef * mean(kl) if g.kl_coef else loss
        loss = loss - g.entropy * mean(entropy) if g.entropy else loss
        parts = (jnp.ones_like(kl), kl, entropy, ratio, clipped.astype(jnp.float32), dual.astype(jnp.float32))
        sums = (jnp.sum(jnp.where(rows.weight > 0, part, 0.0)) for part in parts)
        return loss, jax.lax.stop_gradient(dict(zip(METRICS, (loss, *sums), strict=True)))

    def _score(self, params: Any, tokens: Array, positions: Array, width: int) -> tuple[Array, Array]:
        """Log-probability and entropy, float32 [m, N], at each of the last `width` tokens, at the run's temperature."""
        model = Transformer(self.engine.config)
        outer = {name: leaf for name, leaf in params.items() if name != "layers"}
        hidden, _ = model.hidden(
            {**self._gathered(outer), "layers": params["layers"]}, tokens, positions=positions, around=self._around
        )
        before, target = hidden[:, -width - 1 : -1], tokens[:, -width:]

        def chunk(piece: tuple[Array, Array]) -> tuple[Array, Array]:
            logits = model.logits(self._gathered(outer), piece[0][None])[0] / self.grpo.temperature
            total = jax.nn.logsumexp(logits, axis=1)
            chosen = jnp.take_along_axis(logits, piece[1][:, None], axis=1)[:, 0]
            return chosen - total, total - jnp.sum(jax.nn.softmax(logits) * logits, axis=1)

        logprob, entropy = _in_chunks(chunk, before.reshape(-1, before.shape[-1]), target.reshape(-1))
        return logprob.reshape(target.shape), entropy.reshape(target.shape)

    def _around(self, block: Callable) -> Callable:
        """A layer on weights that are gathered and cast when it runs, and that runs again for its gradient."""
        return jax.checkpoint(lambda x, layer, view, kv: block(x, self._gathered(layer), view, kv), prevent_cse=False)

    def _gathered(self, params: Any) -> Any:
        cast = jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)
        return jax.lax.with_sharding_constraint(cast, replicated(self.mesh))

    def _shared(self, rows: Any) -> Any:
        """Rows cut over all devices."""
        return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, PartitionSpec((GROUPS, MODEL))))


def _norm(tree: Any) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _in_chunks(function: Callable, *columns: Array) -> Any:
    """function over pieces of TOKENS_AT_ONCE rows, each computed again for its gradient; [B, …] → [B]."""
    count = len(columns[0])
    size = min(TOKENS_AT_ONCE, count)
    spare = -count % size
    padded = [jnp.pad(c, [(0, spare)] + [(0, 0)] * (c.ndim - 1)).reshape(-1, size, *c.shape[1:]) for c in columns]
    out = jax.lax.map(jax.checkpoint(function), tuple(padded))
    return jax.tree.map(lambda x: x.reshape(-1)[:count], out)
