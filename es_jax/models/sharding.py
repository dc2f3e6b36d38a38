"""How the transformer's parameters are sharded over a mesh: one table for the master weights and the members' copies.

An entry shards a parameter along both axes of the mesh. The master weights, the anchor and the optimizer's moments are
sharded like this over all devices. A member's copy is gathered over `groups` and stays sharded over `model`: attention
by heads, the MLP by its hidden dimension, the vocabulary by rows (Shoeybi et al. 2019, arXiv 1909.08053, section 3). So
the gather needs no traffic along `model`. Vectors are small and replicated, or sharded with the heads.
"""

import logging
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from es_jax.core.mesh import GROUPS, MODEL, Rules, leaf_spec
from es_jax.core.tree import map_named
from es_jax.models.config import TransformerConfig

logger = logging.getLogger(__name__)

RULES = (
    (r"(^|/)embed/embedding$", PartitionSpec(MODEL, GROUPS)),
    (r"(^|/)head/kernel$", PartitionSpec(GROUPS, MODEL)),
    (r"(^|/)(attn/[qkv]|mlp/(gate|up))/kernel$", PartitionSpec(None, GROUPS, MODEL)),
    (r"(^|/)attn/[qkv]/bias$", PartitionSpec(None, MODEL)),
    (r"(^|/)(attn/o|mlp/down)/kernel$", PartitionSpec(None, MODEL, GROUPS)),
    (r"(^|/)(\w*norm/scale|count)$", PartitionSpec()),  # `count` is in an optimizer's state
)


def leaf_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], *, rules: Rules = RULES) -> NamedSharding:
    """The sharding of the master leaf of that name. Raises ValueError that names the leaf if it does not divide."""
    return NamedSharding(mesh, leaf_spec(mesh, name, shape, rules))


def param_shardings(mesh: Mesh, params: Any, *, rules: Rules = RULES, log: bool = False) -> Any:
    """`leaf_sharding` of every leaf in parameters, an anchor or an optimizer's state; `log` logs each match."""

    def sharding(name: str, leaf: Any) -> NamedSharding:
        where = leaf_sharding(mesh, name, leaf.shape, rules=rules)
        if log:
            logger.debug("%s %s is sharded as %s", name, leaf.shape, tuple(where.spec))
        return where

    return map_named(sharding, params)


def check_heads(config: TransformerConfig, model: int) -> None:
    """Raises ValueError unless `model` devices can share the attention heads evenly; a head is never split."""
    for leaf, heads in (("q", config.heads), ("k", config.kv_heads)):
        if heads % model:
            raise ValueError(
                f"leaf 'layers/attn/{leaf}/kernel' has {heads} heads, which do not divide evenly over mesh.model = "
                f"{model}: set mesh.model to a divisor of {heads}"
            )


def members_spread(config: TransformerConfig, devices: int, *, member_bytes: int, memory: int | None) -> int:
    """How many devices should share a member: the smallest power of two with room for it.

    The smallest of 1, 2, 4, … that divides the devices, heads, MLP and vocabulary, and leaves two thirds of a device
    for master weights, anchor and cache. If none leaves that much, it is the largest that divides. `member_bytes`:
    bytes of one member's weights in the compute dtype. `memory`: bytes of one device; None if unknown, as on CPU.
    """
    spread = 1
    sizes = (devices, config.heads, config.kv_heads, config.mlp_dim, config.vocab_size)
    while memory and 3 * member_bytes > memory * spread and not any(size % (2 * spread) for size in sizes):
        spread *= 2
    return spread
