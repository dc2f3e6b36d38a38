"""From the tensors of a checkpoint to the parameter tree and back, every key used exactly once."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from es_jax.core.tree import named_leaves
from es_jax.models.config import TransformerConfig
from es_jax.models.families import FAMILIES, WEIGHTS, Weight, weights_of
from es_jax.models.rope import rope_frequencies
from es_jax.models.transformer import Params, param_shapes
from es_jax.weights.streaming import Range, Reader, Shardings, chunks, fetch, place, place_stacked, staging, widened


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
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> Params:
    """The parameter tree, stacked over layers, in `dtype`, each leaf where `shardings(path, shape)` says.

    The host holds one tensor at a time, of the largest one's size at most: a leaf that is larger is filled on its
    devices. Raises one ValueError that lists every missing, unexpected and mis-shaped key, or every tensor whose
    numbers no weight has. An output head that a tied checkpoint stores nevertheless is accepted when it equals the
    embedding.
    """
    slots = _slots(config, naming)
    _check_keys(reader, config, slots, naming)
    filler = _Filler(reader, config, np.dtype(dtype), naming)
    largest = max(math.prod(slot.shape) for slot in slots.values())
    params: Params = {}
    for path, shape in param_shapes(config).items():
        mine = {key: slot for key, slot in slots.items() if slot.weight.path == path}
        where = None if shardings is None else shardings(path, shape)
        if math.prod(shape) > largest:
            leaf = place_stacked(filler.layers(mine), shape, dtype=filler.dtype, sharding=where)
        else:
            leaf = place(functools.partial(filler.leaf, mine, shape), where)
        _insert(params, path, leaf)
    if filler.broken:
        raise ValueError(
            f"tensors with NaN, infinite or impossibly large or small numbers: {', '.join(filler.broken)}; the file is "
            "damaged or has its bytes in another order: fetch the model again"
        )
    return params


def hf_tensors(
    params: Params, *, config: TransformerConfig
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Hugging Face's keys with the shapes of their tensors, and the function that brings one of them to the host."""
    leaves, slots = dict(named_leaves(params)), _slots(config, "hf")

    def tensor(key: str) -> np.ndarray:
        slot = slots[key]
        host = fetch(leaves[slot.weight.path], slot.layer)
        return host.T if slot.weight.transpose else host

    return {key: slot.shape for key, slot in slots.items()}, tensor


@dataclasses.dataclass
class _Filler:
    """Host arrays in the tree's layout, from the tensors of a file. `broken`: keys whose numbers no weight has."""

    reader: Reader
    config: TransformerConfig
    dtype: np.dtype
    naming: Literal["hf", "gguf"]
    broken: list[str] = dataclasses.field(default_factory=list)

    def leaf(self, slots: dict[str, _Slot], shape: tuple[int, ...]) -> np.ndarray:
        out = staging(shape, self.dtype)
        for key, slot in slots.items():
            self._fill(out if slot.layer is None else out[slot.layer], key, slot)
        return out

    def layers(self, slots: dict[str, _Slot]) -> list[Callable[[], np.ndarray]]:
        return [functools.partial(self._layer, key, slot) for key, slot in slots.items()]

    def _layer(self, key: str, slot: _Slot) -> np.ndarray:
        out = staging(slot.shape[::-1] if slot.weight.transpose else slot.shape, self.dtype)
        self._fill(out, key, slot)
        return out

    def _fill(self, out: np.ndarray, key: str, slot: _Slot) -> None:
        rows, seen = out.T if slot.weight.transpose else out, Range()
        offset = np.float32(_gguf_offset(slot.weight, self.config) if self.naming == "gguf" else 0)
        places = None
        if self.naming == "gguf" and FAMILIES[self.config.family].gguf_permuted and slot.weight.rotary:
            places = np.argsort(half_split(np.arange(slot.shape[0]), heads=getattr(self.config, slot.weight.rotary)))
        for where, chunk in chunks(self.reader, key):
            values = widened(chunk)
            seen.add(values)
            if offset:
                values = values - offset
            elif chunk.dtype == self.dtype:
                values = chunk
            if places is None:
                np.copyto(rows[where], values, casting="unsafe")
            else:
                rows[places[where]] = values.astype(self.dtype, copy=False)
        if not seen.plausible():
            self.broken.append(key)


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
    if reader.shapes[key] != reader.shapes[embedding]:
        return False
    return all(np.array_equal(rows, reader.read(embedding, at.start, at.stop)) for at, rows in chunks(reader, key))


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
