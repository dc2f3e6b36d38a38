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
    """What a step's completions need at least, over the published peaks of the chips (`es_jax.core.chips`).

    Counted are the products of weights with tokens, 2 operations a weight and token: a shared prefix once for each
    model, the head once for each new token; attention is left out. A completion's last token is not read on, so its
    layers are not computed. Memory is read once for all weights at each model's prefill and at each decode step, and
    the steps are as few as `slots` rows at once allow. Both are lower bounds, so the utilisation is, too. `None` on a
    chip that is not in the table, such as a CPU.

    Args:
      model: whose weights.
      itemsize: bytes of a weight of a member.
      slots: rows that a member decodes at once.
      devices: how many work.
      prefill, new: tokens of all completions of the step.
      completions: how many there are.
      models: how many different weights make them.
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
