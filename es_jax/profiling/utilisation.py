"""What share of the chips' peaks the decoding of a step used."""

import jax

from es_jax.core.chips import find_chip
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import matrix_weights


def utilisation(
    model: TransformerConfig,
    *,
    itemsize: int,
    slots: int,
    devices: int,
    prefill: int,
    new: int,
    completions: int,
    models: int,
    seconds: float,
) -> dict[str, float | None]:
    """What a step's completions need at least, over the chips' published peaks; `None` on a chip of unknown peaks.

    Operations are the products of weights with tokens, 2 a weight and token, without attention: a shared prefix once
    for each model, the head once for each new token. A completion's last token does not pass the layers. Memory is read
    once for all weights at each prefill and at each decode step, which are as few as `slots` rows at once allow.

    Args:
      itemsize: bytes of a weight.
      slots: rows that a model decodes at once.
      prefill, new: tokens of all completions of the step.
      models: how many different weights make the completions.
      seconds: of decoding.
    """
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is None or not seconds:
        return {"flop_utilisation": None, "bandwidth_utilisation": None}
    layers, head = matrix_weights(model)
    flops = 2 * (layers * (prefill + new - completions) + head * new)
    memory = (layers + head) * itemsize * (models + max(new - completions, 0) / slots)
    return {
        "flop_utilisation": flops / (seconds * devices * chip.flops),
        "bandwidth_utilisation": memory / (seconds * devices * chip.bandwidth),
    }
