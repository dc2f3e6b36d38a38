"""Whole models: `load_model` from a folder, a .gguf file or the hub; `save_model` to a folder."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from es_jax.models.config import TransformerConfig
from es_jax.models.hf_config import from_hf, to_hf
from es_jax.models.transformer import Params
from es_jax.weights import convert, safetensors, tokenizer
from es_jax.weights.gguf import GGUFReader, from_gguf

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
_HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "merges.txt",
    "tokenizer.model",
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint in memory: `params` as `Transformer` takes them, `digest` the sha256 of the weight files,
    `stop_ids` every token id that ends a turn."""

    config: TransformerConfig
    params: Params
    tokenizer: Any
    digest: str
    stop_ids: tuple[int, ...]


def load_model(
    source: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: jnp.dtype | None = None,
    shardings: Shardings | None = None,
) -> Model:
    """Read a model from a Hugging Face folder, a .gguf file (dequantised), or the hub by name.

    `dtype`: of every parameter, float32 when None. `shardings(path, shape)` places each leaf, for example
    "layers/attn/q/kernel" [L, D, H*hd]; with only a `mesh`, leaves are replicated over it; with neither they
    go to the default device. The host holds one leaf at a time.

    Raises FileNotFoundError when there is nothing to read, ValueError for a broken file, a config that asks
    for what is not implemented, or keys that do not fit it (all of them listed).
    """
    path = resolve(source)
    wanted = jnp.dtype(jnp.float32 if dtype is None else dtype)
    place = _placer(mesh, shardings)
    if path.is_file():
        reader = GGUFReader(path)
        config = from_gguf(reader)
        words = tokenizer.from_gguf_metadata(reader.metadata)
        ends = [reader.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        params = convert.to_params(reader, config, naming="gguf", dtype=wanted, place=place)
        return Model(config, params, words, safetensors.digest([path]), tokenizer.stop_ids(words, *ends))
    config = config_only(path)
    files = safetensors.find_files(path)
    words = tokenizer.from_folder(path)
    ends = [_json(path / name).get("eos_token_id") for name in ("config.json", "generation_config.json")]
    params = convert.to_params(safetensors.SafetensorsReader(files), config, naming="hf", dtype=wanted, place=place)
    return Model(config, params, words, safetensors.digest(files), tokenizer.stop_ids(words, *ends))


def config_only(source: str | Path) -> TransformerConfig:
    """The config of what `load_model(source)` would read, without its weights."""
    path = resolve(source, weights=False)
    if path.is_file():
        return from_gguf(GGUFReader(path))
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json: give a Hugging Face model folder or a .gguf file")
    return from_hf(_json(path / "config.json"))


def save_model(path: str | Path, model: Model) -> None:
    """Write a Hugging Face folder that `load_model` and transformers read: config, weights, tokenizer.

    Weights keep their dtype. Every process of a run may call it only where it holds all of every leaf.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    words = model.tokenizer
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    dtype = str(model.params["embed"]["embedding"].dtype)
    _write_json(folder / "config.json", {**to_hf(model.config), "torch_dtype": dtype, **ids})
    _write_json(folder / "generation_config.json", {**ids, "eos_token_id": list(model.stop_ids)})
    words.save_pretrained(str(folder))
    convert.write_params(folder / safetensors.SINGLE, model.params, config=model.config)


def resolve(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder or .gguf file of `source`; a hub name is fetched (or found in the local hub cache).

    Raises FileNotFoundError when it is neither here nor to be had, ValueError for a file of another kind.
    """
    if str(source) == "lab":
        return Path(__file__).parent / "lab"
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"source = {str(source)!r} is a file but not .gguf: give the folder it is in")
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) or path.suffix == ".gguf":
        raise FileNotFoundError(f"source = {str(source)!r} is no folder, no .gguf file and no hub name (owner/name)")
    from huggingface_hub import snapshot_download

    files = [name for name in _HUB_FILES if weights or name == "*.json"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise FileNotFoundError(
            f"source = {str(source)!r} is no local folder and the hub did not give it ({reason}): check the "
            "name and the network, or download the model and give its folder"
        ) from error


def _placer(mesh: jax.sharding.Mesh | None, shardings: Shardings | None) -> convert.Place:
    if shardings is None and mesh is not None:
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return _placer(None, lambda path, shape: replicated)

    def place(path: str, leaf: np.ndarray) -> jax.Array:
        if shardings is None:
            return jnp.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, shardings(path, leaf.shape), lambda index: leaf[index])

    return place


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the model again") from None


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
