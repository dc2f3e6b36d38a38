"""The share of the chips' peaks that the decoding of a step used."""

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
    """The least work for a step's completions, divided by the chips' published peaks; `None` if the peaks are unknown.

    Operations are the products of weights with tokens: 2 per weight and token, without attention. A shared prefix
    counts once for each model, the output head once for each new token. A completion's last token does not pass through
    the layers. All weights are read from memory once at each prefill and each decode step, and these are as few as
    `slots` rows at once allow.

    Args:
      itemsize: bytes of a weight.
      slots: rows decoded at once by a model.
      prefill, new: tokens of all completions of the step.
      models: how many different sets of weights make the completions.
      seconds: time of decoding.
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
