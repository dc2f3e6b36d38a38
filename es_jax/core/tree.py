"""Names for the leaves of a pytree; noise, shardings and checkpoints address leaves only by these names."""

from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple) -> str:
    """The leaf address `layers/attn/q/kernel` of a JAX key path; the same for dicts, dataclasses and sequences."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(name, leaf)` of every leaf, in the tree's own order.

    >>> named_leaves({"a": [1, 2]})
    [('a/0', 1), ('a/1', 2)]
    """
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(function: Callable, tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` with a function that gets the leaf's name as its first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def count(tree: Any) -> int:
    """How many numbers the tree holds: d in the papers. A tied embedding is one leaf, so it counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
