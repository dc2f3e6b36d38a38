"""Converts the tensors of a checkpoint to the parameter tree and back; every key is used exactly once."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from es_jax.core.tree import named_leaves
from es_jax.models.config import TransformerConfig
from es_jax.models.families import FAMILIES, WEIGHTS, Weight, weights_of
from es_jax.models.rope import rope_frequencies
from es_jax.models.transformer import Params, param_shapes
from es_jax.weights.streaming import (
    Reader,
    Shape,
    Shardings,
    chunks,
    fetch,
    is_plausible,
    place,
    place_stacked,
    staging,
    widened,
)


class _Slot(NamedTuple):
    """What the tensor of one key in a file must be."""

    weight: Weight
    layer: int | None
    shape: Shape  # in the file
    offset: int  # an offset in the file: GGUF's norms store 1 + scale, the factor itself
    heads: int  # GGUF interleaves the halves of the rows within each head; 0: rows have the tree's order


def to_params(
    reader: Reader,
    config: TransformerConfig,
    *,
    naming: Literal["hf", "gguf"],
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> Params:
    """The parameter tree, stacked over layers, in `dtype`, each leaf where `shardings(path, shape)` says.

    The host holds one tensor at a time; a leaf larger than the largest tensor is filled on its devices. Raises one
    ValueError that lists every key that is missing, unexpected or of a wrong shape, or every tensor with impossible
    numbers. The output head of a tied checkpoint is accepted if it equals the embedding.
    """
    slots = _slots(config, naming)
    _check_keys(reader, config, slots, naming)
    dtype, broken = np.dtype(dtype), []

    def host_leaf(tensors: dict[str, _Slot], shape: Shape) -> np.ndarray:
        leaf = staging(shape, dtype)
        for key, slot in tensors.items():
            tensor = leaf if slot.layer is None else leaf[slot.layer]
            if not _fill(tensor.T if slot.weight.transpose else tensor, reader, key, slot):
                broken.append(key)
        return leaf

    largest = max(math.prod(slot.shape) for slot in slots.values())
    params = {}
    for path, shape in param_shapes(config).items():
        tensors = {key: slot for key, slot in slots.items() if slot.weight.path == path}
        sharding = None if shardings is None else shardings(path, shape)
        if math.prod(shape) > largest:
            layers = [{key: slot._replace(layer=None)} for key, slot in tensors.items()]
            makers = [functools.partial(host_leaf, layer, shape[1:]) for layer in layers]
            params[path] = place_stacked(makers, shape, dtype=dtype, sharding=sharding)
        else:
            params[path] = place(functools.partial(host_leaf, tensors, shape), sharding)
    if broken:
        raise ValueError(
            f"tensors with NaN, infinite or impossibly large or small numbers: {', '.join(broken)}; the file is "
            "damaged or has the wrong byte order: fetch the model again"
        )
    return unflatten_dict(params, sep="/")


def hf_tensors(params: Params, *, config: TransformerConfig) -> tuple[dict[str, Shape], Callable[[str], np.ndarray]]:
    """Hugging Face's keys with the shapes of their tensors, and a function that fetches one to the host."""
    leaves, slots = dict(named_leaves(params)), _slots(config, "hf")

    def tensor(key: str) -> np.ndarray:
        slot = slots[key]
        host = fetch(leaves[slot.weight.path], slot.layer)
        return host.T if slot.weight.transpose else host

    return {key: slot.shape for key, slot in slots.items()}, tensor


def _fill(tensor: np.ndarray, reader: Reader, key: str, slot: _Slot) -> bool:
    """Fill an array, in the layout of the file, from its tensor; returns whether its numbers can be weights."""
    order = np.argsort(half_split(np.arange(len(tensor)), heads=slot.heads)) if slot.heads else None
    largest = np.float32(0)
    for rows, chunk in chunks(reader, key):
        values = widened(chunk)
        with np.errstate(invalid="ignore"):  # NaN is found at the end
            largest = np.maximum(largest, np.abs(values).max())
        if slot.offset:
            values = values - np.float32(slot.offset)
        elif chunk.dtype == tensor.dtype:
            values = chunk
        tensor[rows if order is None else order[rows]] = values
    return is_plausible(largest)


def half_split(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """Undo GGUF's order of rotary rows within each head: 0, hd/2, 1, hd/2 + 1, … becomes 0, 1, 2, …

    >>> half_split(np.array([0, 2, 1, 3]), heads=1).tolist()
    [0, 1, 2, 3]
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _slots(config: TransformerConfig, naming: str) -> dict[str, _Slot]:
    slots, shapes, gguf = {}, param_shapes(config), naming == "gguf"
    for weight in weights_of(config):
        stacked = weight.path.startswith("layers/")
        shape = shapes[weight.path][1:] if stacked else shapes[weight.path]
        shape = shape[::-1] if weight.transpose else shape
        offset = int(gguf and config.norm_plus_one and weight.path.endswith("norm/scale"))
        permuted = gguf and FAMILIES[config.family].gguf_permuted and weight.rotary
        heads = getattr(config, weight.rotary) if permuted else 0
        for layer in range(config.layers) if stacked else (None,):
            slots[getattr(weight, naming).format(layer)] = _Slot(weight, layer, shape, offset, heads)
    return slots


def _check_keys(reader: Reader, config: TransformerConfig, slots: dict[str, _Slot], naming: str) -> None:
    shapes = reader.shapes
    problems = [f"missing: {key} {slot.shape}" for key, slot in slots.items() if key not in shapes]
    problems += [
        f"unexpected: {key} {shape}" + ", frequencies that are not those of the config" * ("_freq" in key)
        for key, shape in shapes.items()
        if key not in slots and not _spare(reader, config, key, naming)
    ]
    problems += [
        f"wrong shape: {key} is {shapes[key]}, the config says {slot.shape}"
        for key, slot in slots.items()
        if shapes.get(key, slot.shape) != slot.shape
    ]
    if problems:
        fit = f"the {naming} weights do not fit the {config.family} config:"
        raise ValueError("\n  ".join([fit, *problems]))


def _spare(reader: Reader, config: TransformerConfig, key: str, naming: str) -> bool:
    """Whether the key only repeats what the tree or the config contains: a tied head, or rotary frequencies."""
    if key.endswith(".rotary_emb.inv_freq"):
        layer = re.search(r"\.layers\.(\d+)\.", key)
        kinds = config.layer_kinds if layer is None else config.layer_kinds[int(layer[1]) :][:1]
        frequencies = [rope_frequencies(config, local=local) for local, _ in dict.fromkeys(kinds)]
        return bool(frequencies) and all(_near(reader.read(key), expected) for expected in frequencies)
    if naming == "gguf" and key == "rope_freqs.weight":
        plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        return _near(reader.read(key), plain / rope_frequencies(config))
    names = {weight.path: getattr(weight, naming) for weight in WEIGHTS}
    embedding, shapes = names["embed/embedding"], reader.shapes
    if not config.tied_embeddings or key != names["head/kernel"] or shapes[key] != shapes.get(embedding):
        return False
    return all(np.array_equal(rows, reader.read(embedding, at.start, at.stop)) for at, rows in chunks(reader, key))


def _near(values: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to the rounding of bfloat16, in which some files hold frequencies."""
    return values.shape == expected.shape and np.allclose(values.astype(np.float32), expected, rtol=2.0**-7, atol=0)
