"""From the tensors of a checkpoint to the parameter tree and back, every key used exactly once."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from es_jax.core.tree import named_leaves
from es_jax.models.config import TransformerConfig
from es_jax.models.families import FAMILIES, WEIGHTS, Weight, weights_of
from es_jax.models.rope import rope_frequencies
from es_jax.models.transformer import Params, param_shapes
from es_jax.weights import safetensors

Place = Callable[[str, np.ndarray], jax.Array]  # (path, host array) → device array


@runtime_checkable
class Reader(Protocol):
    """Tensors by key, as a file format offers them."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, key: str) -> np.ndarray:
        """The tensor with that key, in any float type."""


@dataclasses.dataclass(frozen=True)
class _Slot:
    """What one key of a file must be, and where it goes."""

    weight: Weight
    layer: int | None
    shape: tuple[int, ...]  # in the file


def to_params(
    reader: Reader,
    config: TransformerConfig,
    *,
    naming: Literal["hf", "gguf"],
    dtype: jnp.dtype = jnp.float32,
    place: Place = lambda path, leaf: jnp.asarray(leaf),
) -> Params:
    """The parameter tree, stacked over layers, in `dtype`; `place` puts each finished leaf on its devices.

    Tensors are read one at a time into one leaf at a time, so the host holds one leaf. Raises one ValueError
    that lists every missing, unexpected and mis-shaped key, or every one with a number that is not finite. An
    output head that a tied checkpoint stores nevertheless is accepted when it equals the embedding.
    """
    slots = _slots(config, naming)
    _check_keys(reader, config, slots, naming)
    unpermute = naming == "gguf" and FAMILIES[config.family].gguf_permuted
    params: Params = {}
    broken: list[str] = []
    for path, shape in param_shapes(config).items():
        leaf = np.empty(shape, np.dtype(dtype))
        for key, slot in slots.items():
            if slot.weight.path == path:
                tensor = reader.read(key)
                if not np.isfinite(tensor.astype(np.float32)).all():
                    broken.append(key)
                if unpermute and slot.weight.rotary:
                    tensor = half_split(tensor, heads=getattr(config, slot.weight.rotary))
                if naming == "gguf":
                    tensor = tensor - np.float32(_gguf_offset(slot.weight, config))
                target = leaf if slot.layer is None else leaf[slot.layer]
                np.copyto(target, tensor.T if slot.weight.transpose else tensor, casting="unsafe")
        _insert(params, path, place(path, leaf))
    if broken:
        raise ValueError(f"tensors with NaN or infinite numbers: {', '.join(broken)}; fetch the model again")
    return params


def write_params(path: Path, params: Params, *, config: TransformerConfig) -> None:
    """Write stacked `params` to one safetensors file under Hugging Face's keys, in their own dtype."""
    leaves = dict(named_leaves(params))

    def tensor(slot: _Slot) -> np.ndarray:
        leaf = leaves[slot.weight.path]
        host = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
        return host.T if slot.weight.transpose else host

    safetensors.write(path, {key: tensor(slot) for key, slot in _slots(config, "hf").items()})


def half_split(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """Undo GGUF's order of rotary rows within each head: 0, hd/2, 1, hd/2 + 1, … becomes 0, 1, 2, …

    >>> half_split(np.array([0, 2, 1, 3]), heads=1).tolist()
    [0, 1, 2, 3]
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _slots(config: TransformerConfig, naming: str) -> dict[str, _Slot]:
    shapes = param_shapes(config)
    slots = {}
    for weight in weights_of(config):
        stacked = weight.path.startswith("layers/")
        shape = shapes[weight.path][1:] if stacked else shapes[weight.path]
        shape = shape[::-1] if weight.transpose else shape
        for layer in range(config.layers) if stacked else (None,):
            slots[getattr(weight, naming).format(layer)] = _Slot(weight, layer, shape)
    return slots


def _check_keys(reader: Reader, config: TransformerConfig, slots: dict[str, _Slot], naming: str) -> None:
    shapes = reader.shapes
    problems = [f"missing: {key} {slot.shape}" for key, slot in slots.items() if key not in shapes]
    spare = {key: _spare(reader, config, key, naming) for key in shapes if key not in slots}
    problems += [f"unexpected: {key} {shapes[key]}{_remark(key)}" for key, is_spare in spare.items() if not is_spare]
    problems += [
        f"wrong shape: {key} is {shapes[key]}, the config says {slot.shape}"
        for key, slot in slots.items()
        if key in shapes and shapes[key] != slot.shape
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the {naming} weights do not fit the {config.family} config:\n  {lines}")


def _gguf_offset(weight: Weight, config: TransformerConfig) -> float:
    """What GGUF files add to a tensor: they hold 1 + scale where norms multiply by that."""
    return 1.0 if config.norm_plus_one and weight.path.endswith("norm/scale") else 0.0


def _spare(reader: Reader, config: TransformerConfig, key: str, naming: str) -> bool:
    """Whether the key repeats what the tree or the config says already: a tied head, or rotary frequencies."""
    if key.endswith(".rotary_emb.inv_freq"):
        layer = re.search(r"\.layers\.(\d+)\.", key)
        kinds = config.layer_kinds if layer is None else config.layer_kinds[int(layer[1]) :][:1]
        frequencies = [rope_frequencies(config, local=local) for local, _ in dict.fromkeys(kinds)]
        return bool(frequencies) and all(_near(reader.read(key), expected) for expected in frequencies)
    if naming == "gguf" and key == "rope_freqs.weight":
        plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        return _near(reader.read(key), plain / rope_frequencies(config))
    names = {weight.path: getattr(weight, naming) for weight in WEIGHTS}
    embedding = names["embed/embedding"]
    if not config.tied_embeddings or key != names["head/kernel"] or embedding not in reader.shapes:
        return False
    return bool(np.array_equal(reader.read(key), reader.read(embedding)))


def _remark(key: str) -> str:
    return ", frequencies that are not those of the config" if "_freq" in key else ""


def _near(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to the rounding of bfloat16, which some files hold frequencies in."""
    return found.shape == expected.shape and np.allclose(found.astype(np.float32), expected, rtol=2.0**-7, atol=0)


def _insert(tree: Params, path: str, leaf: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf
