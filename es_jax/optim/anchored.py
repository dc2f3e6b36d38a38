"""Anchored Weight Decay (AWD) as an optax transformation: it pulls the weights a little toward where training began.

This file needs only jax and optax, so you can copy it alone into another project.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AnchoredWeightDecayState(NamedTuple):
    """How many updates have been made, and the weights that they are pulled to."""

    count: jax.Array  # type: ignore[assignment]
    anchor: Any


def anchored_weight_decay(
    rate: float | jax.Array | optax.Schedule,
    *,
    penalty: str = "l2",
    mask: Any | Callable[[Any], Any] | None = None,
    anchor_dtype: Any = None,
    anchor_sharding: Any = None,
    arithmetic: str = "float32",
    ema_decay: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Pulls the weights toward those given to `init`, after each step (anchored weight decay, AWD).

    u are the updates that arrive, θ₀ the weights at `init`, and Δ = θ + u − θ₀ the distance after the step. The updates
    that leave bring the weights to

        θ₀ + (1 − rate)·Δ                          with penalty "l2",
        θ₀ + sign(Δ)·max(|Δ| − rate, 0)            with penalty "l1".

    In the paper's terms the rate is αλ, learning rate times penalty strength. l2 bounds how far the weights go. l1 also
    returns weights that hardly moved to the anchor. Source: arXiv 2605.30148, section 5.

    Put it last, where the finished step u arrives with its sign and learning rate, as in
    `chain(adam(1e-3), anchored_weight_decay(0.01))`. That is right after every optimizer of optax that keeps no weights
    of its own. Optimizers that do, and wrappers that skip steps, need another place. This transformation recognises
    only `lookahead`, and refuses it. For the others, nothing but this table warns you; AWD in it is this
    transformation:

    ```text
    =================================================  ===============================================================
    with                                               write
    =================================================  ===============================================================
    contrib.schedule_free                              schedule_free(chain(sgd(α), AWD), α). After it, the weights
                                                       that are evaluated run away. l1 reaches the anchor in the limit
    contrib.schedule_free_sgd, schedule_free_adamw     not these: schedule_free around chain(sgd(α), AWD), or another
    lookahead                                          lookahead(chain(sgd(α), AWD), …). After it: refused. Not with
                                                       reset_state=True, which makes a new anchor at every turn
    MultiSteps                                         MultiSteps(chain(…, AWD), k). After it, AWD pulls k times a step
    apply_every                                        not this, for the same reason: MultiSteps
    contrib.sam                                        sam(chain(…, AWD), adversary). After it, AWD pulls the
                                                       adversary's points, too
    apply_if_finite, conditionally_mask                inside, a skipped step is not pulled; after it, it is
    conditionally_transform                            conditionally_transform(AWD, …) pulls at its steps alone
    masked, partition, multi_transform, flatten,       inside or after: the same
    selective_transform, named_chain,
    contrib.split_real_and_imaginary
    scale_by_learning_rate, scale_by_schedule, clip,   chain(these, AWD). After AWD they scale the pull as well, and a
    add_noise, ema, contrib.reduce_on_plateau          change of sign turns it round
    lbfgs, line searches, polyak_sgd                   chain(these, AWD). The value and gradient that a line search
                                                       keeps are of weights not pulled: compute them anew
    keep_params_nonnegative, freeze                    chain(…, AWD, these)
    incremental_update                                 nothing else: it averages weights that AWD has pulled. For an
                                                       anchor that is such an average: ema_decay
    nnx.Optimizer and TrainState of Flax               give them chain(…, AWD). The anchor is the weights that they
                                                       are made with: load those to be kept before
    contrib.mechanize, prodigy, dadapt_adamw           chain(these, AWD). They may lengthen their steps against the pull
    contrib.cocob, madgrad                             nowhere: they compute the weights from all gradients and the
                                                       start, and so undo the pull
    inject_hyperparams                                 inject_hyperparams(AWD)(rate=…, mask=…), or around a chain. optax
                                                       takes callables for schedules: a factory of yours that is given
                                                       the mask needs static_args="mask", or is refused
    =================================================  ===============================================================
    ```

    Leaves are treated as `optax.add_decayed_weights` treats them. Updates of integers, booleans and Python numbers
    leave as floats. Complex numbers are pulled as pairs of real ones. An update that is None stays None.

    Args:
      rate: the fraction of the distance that a step removes (l2, in [0, 1)), or the distance that it removes (l1, at
        least 0, in the unit of the weights). A number, or a schedule of the number of updates made so far.
      penalty: "l2" or "l1".
      mask: a tree of booleans like the parameters (or a prefix of it, but not one boolean), or a callable that makes
        one. Leaves where it is False are left alone and have no anchor.
      anchor_dtype: the dtype in which the anchor of real parameters is kept. By default each parameter's own. A
        narrower one moves the anchor itself by its rounding.
      anchor_sharding: a sharding, or a tree of them like the parameters, on which the anchor is put. By default the
        anchor is where the parameters are. With a memory kind of the host, such as "pinned_host", `update` (inside jit)
        brings it to the devices one leaf at a time.
      arithmetic: "float32" (float64 for float64 updates) computes one correction of the update and rounds once. "param"
        takes the step, subtracts the anchor, shrinks and adds it back in the parameters' own dtype, and rounds each
        result, as the published code does. In 16 bits that loses most of the decay; it is there to explain published
        figures.
      ema_decay: β in [0, 1). The anchor follows the weights: anchor ← β·anchor + (1 − β)·θ after every update, an
        exponential average over about 1/(1 − β) updates. By default it stays where `init` put it.

    Returns:
      A transformation whose `update` needs `params`. The anchor is a copy, so the parameters may be donated.

    Raises:
      ValueError: the penalty or arithmetic is unknown, the rate or `ema_decay` is out of range, the mask is one
        boolean, the parameters are those of `optax.lookahead`, or `update` is called without params.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), anchored_weight_decay(0.5))
      >>> params = {"w": jnp.array([1.0])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([-1.0])}, state, params)
      >>> optax.apply_updates(params, updates)["w"].tolist()  # one step up to 2, half of it pulled back
      [1.5]
    """
    if penalty not in _PULL["float32"]:
        raise ValueError(f"penalty is {penalty!r}: it must be one of {', '.join(map(repr, _PULL['float32']))}")
    if arithmetic not in _PULL:
        raise ValueError(f"arithmetic is {arithmetic!r}: it must be 'float32' or 'param'")
    if not isinstance(ema_decay, None | jax.core.Tracer) and (callable(ema_decay) or not 0 <= ema_decay < 1):
        raise ValueError(
            f"ema_decay is {ema_decay}: it is a number, the decay of the anchor's exponential average, and "
            "must be in [0, 1)"
        )
    _check_rate(rate, penalty)
    mask = mask.make if isinstance(mask, _Mask) else mask
    _check_mask(mask)

    def init(params):
        _check_params(params)
        whole_dtype = None if ema_decay is None else jnp.float32
        anchor = jax.tree.map(lambda p: _copied(p, anchor_dtype, whole_dtype), params)
        if anchor_sharding is not None:
            anchor = jax.device_put(anchor, anchor_sharding)
        return AnchoredWeightDecayState(jnp.zeros([], jnp.int32), anchor)

    def update(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError("anchored_weight_decay needs the parameters: call update(updates, state, params)")
        _check_params(params)
        now, anchor = rate(state.count) if callable(rate) else rate, state.anchor

        def pulled(u, p, a):
            return None if u is None else _pulled(u, p, a, now, penalty, arithmetic)

        updates = jax.tree.map(
            pulled, updates, params, _on_devices(anchor, anchor_sharding), is_leaf=lambda u: u is None
        )
        if ema_decay is not None:
            anchor = jax.tree.map(
                lambda a, p, u: a if u is None else _followed(a, p, u, ema_decay), anchor, params, updates
            )
        return updates, AnchoredWeightDecayState(optax.safe_increment(state.count), anchor)

    transformation = optax.GradientTransformationExtraArgs(init, update)
    return transformation if mask is None else optax.masked(transformation, mask)


class _Mask(NamedTuple):
    """A callable that makes a mask, and is not a callable itself."""

    make: Callable[[Any], Any]


class _Signature(inspect.Signature):
    """As `optax.inject_hyperparams` reads it, which takes every callable among the arguments for a schedule."""

    def bind(self, *args, **kwargs):
        arguments = (bound := super().bind(*args, **kwargs)).arguments
        if callable(mask := arguments.get("mask")):
            arguments["mask"] = _Mask(mask)
        if callable(dtype := arguments.get("anchor_dtype")):  # a class, such as jnp.bfloat16
            arguments["anchor_dtype"] = jnp.dtype(dtype)
        return bound


_plain = inspect.signature(anchored_weight_decay)
anchored_weight_decay.__signature__ = _Signature(  # type: ignore[attr-defined]
    [*_plain.parameters.values()], return_annotation=_plain.return_annotation
)


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _copied(param, dtype, whole_dtype):
    """A leaf of the anchor: of real numbers in `dtype`, of whole numbers and booleans in `whole_dtype`."""
    param = jnp.asarray(param)
    if not _is_float(param):
        dtype = whole_dtype
    return jnp.array(param, None if jnp.iscomplexobj(param) else dtype, copy=True)


def _pulled(update, param, anchor, rate, penalty, arithmetic):
    """The update of a leaf, in its own dtype, or the parameter's where only that is one of floats."""
    u, p, a = (jnp.asarray(x) for x in (update, param, anchor))
    if jnp.iscomplexobj(u) or jnp.iscomplexobj(p):
        parts = ((x.real, x.imag) for x in (u, p, a))
        return jax.lax.complex(*(_pulled(*part, rate, penalty, arithmetic) for part in zip(*parts, strict=True)))
    own = next((x.dtype for x in (u, p) if _is_float(x)), jnp.dtype(jnp.float32))
    wide = jnp.float32 if jnp.finfo(own).bits < 32 else own
    dtype = p.dtype if arithmetic == "param" and _is_float(p) else wide
    values = (jnp.asarray(x, dtype) for x in (u, p, a, rate))
    return _PULL[arithmetic][penalty](*values).astype(own)


def _followed(anchor, param, update, ema_decay):
    """The anchor of a leaf after the update."""
    param = jnp.asarray(param)
    dtype = param.dtype if _is_float(param) else update.dtype
    new = (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)
    new = new.astype(jnp.promote_types(anchor.dtype, jnp.float32))
    old = anchor.astype(new.dtype)
    return (old + jnp.asarray(1 - ema_decay, new.dtype) * (new - old)).astype(anchor.dtype)


def _on_devices(anchor, sharding):
    """The anchor, brought from the host where its sharding keeps it there."""

    def brought(sharding, part):
        if getattr(sharding, "memory_kind", None) in (None, "device"):
            return part
        return jax.tree.map(lambda a: jax.device_put(a, sharding.with_memory_kind("device")), part)

    return jax.tree.map(brought, sharding, anchor, is_leaf=lambda s: s is None)


def _l2(update, param, anchor, rate):
    # Written as a correction of the update, so that it rounds like the step itself; all the way at rate 1 is exact.
    return jnp.where(rate == 1, anchor - param, update - rounded(rate * (param + update - anchor)))


def rounded(product):
    """A float32 product less its last bit: no compiler then takes it unrounded into the sum after it."""
    if product.dtype != jnp.float32:
        return product
    bits = jax.lax.bitcast_convert_type(product, jnp.uint32) & jnp.uint32(0xFFFFFFFE)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _l1(update, param, anchor, rate):
    distance = param + update - anchor
    return jnp.where((jnp.abs(distance) <= rate) & (rate > 0), anchor - param, update - jnp.clip(distance, -rate, rate))


def _published(shrink):
    return lambda update, param, anchor, rate: anchor + shrink(param + update - anchor, rate) - param


_PULL = {
    "float32": {"l2": _l2, "l1": _l1},
    "param": {
        "l2": _published(lambda moved, rate: (1 - rate) * moved),
        "l1": _published(lambda moved, rate: jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - rate, 0)),
    },
}


def _check_params(params: Any) -> None:
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "the parameters are those of optax.lookahead, whose fast and slow weights diverge if an update after it "
            "changes them: put the decay inside, lookahead(chain(optimizer, anchored_weight_decay(rate)), …)"
        )


def _check_mask(mask: Any) -> None:
    if mask is not None and not callable(mask) and jax.tree_util.treedef_is_leaf(jax.tree.structure(mask)):
        raise ValueError(
            f"mask is {mask}: it must be a tree of booleans, or a callable that makes one. If it was a callable, say "
            "static_args='mask' to optax.inject_hyperparams, which otherwise takes the callable for a schedule"
        )


def _check_rate(rate: Any, penalty: str) -> None:
    if callable(rate) or isinstance(rate, jax.core.Tracer):
        return
    if penalty == "l2" and not 0 <= float(rate) < 1:
        raise ValueError(
            f"rate is {rate} with penalty 'l2': it is the fraction of the distance to the anchor that each step "
            "removes, and must be in [0, 1). In the paper's terms αλ < 1, so lower the strength λ or the learning "
            "rate α"
        )
    if not float(rate) >= 0:
        raise ValueError(f"rate is {rate} with penalty {penalty!r}: it must not be negative or NaN")
