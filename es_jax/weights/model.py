"""Whole models: `load_model` from a folder, a .gguf file or the hub, and `save_model` to a folder."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from es_jax.core import processes
from es_jax.models.config import TransformerConfig
from es_jax.models.hf_config import from_hf, to_hf
from es_jax.models.transformer import Params
from es_jax.weights import boundary, convert, safetensors, tokenizer
from es_jax.weights.files import digest, find_files, resolve
from es_jax.weights.gguf import GGUFReader, from_gguf
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.streaming import FileReader, Shardings
from es_jax.weights.tokenizer_files import save_tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in memory: its sizes, weights and tokenizer.

    Attributes:
      config: the model's sizes and options.
      params: the weights, a tree as `Transformer` takes it, with stacked layers.
      tokenizer: a tokenizer of the transformers library.
      digest: the sha256 of the weight files, in hexadecimal.
      stop_token_ids: every token id that ends a turn.
      generation: the fields of generation_config.json.

    Examples:
      >>> lab = load_model("lab")
      >>> lab.config.layers, lab.params["embed"]["embedding"].shape == (lab.config.vocab_size, lab.config.width)
      (2, True)
    """

    config: TransformerConfig
    params: Params
    tokenizer: Any
    digest: str
    stop_token_ids: tuple[int, ...]
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, prompt: tokenizer.Prompt) -> list[int]:
        """Encodes a prompt as the token ids that the model reads, in training, evaluation and `es_jax.complete` alike.

        Messages go through the chat template. After a last message of role "user", the assistant's turn is opened. A
        last message of role "assistant" is left open, to be continued. Plain text gets the special tokens that the
        tokenizer adds before it (BOS, if any), and no EOS.

        Args:
          prompt: plain text, or messages, each with "role" and "content".

        Returns:
          Token ids in 0..V − 1.

        Raises:
          ValueError: the template does not take the messages, or there is no template.

        Examples:
          >>> load_model("lab").encode("A37+48=")
          [17, 5, 9, 12, 6, 10, 14]
        """
        return tokenizer.encode_prompt(self.tokenizer, prompt)

    def decode(self, prompt: Sequence[int], completion: Sequence[int]) -> str:
        """Decodes a completion as graders see it: the text after the prompt, without stop tokens, BOS, EOS and padding.

        Args:
          prompt: the prompt's token ids.
          completion: the completion's token ids.

        Returns:
          The text.

        Examples:
          >>> lab = load_model("lab")
          >>> lab.decode(lab.encode("A37+48="), lab.encode("85"))
          '85'
        """
        silent = boundary.silent_token_ids(self.tokenizer, self.stop_token_ids)
        spoken = [token for token in completion if token not in silent]
        return boundary.completion_texts(self.tokenizer, [boundary.prompt_end(self.tokenizer, prompt)], [spoken])[0]


def load_model(
    source: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
) -> Model:
    """Loads a model from a Hugging Face folder, a .gguf file, the hub, or this package.

    Weights of a .gguf file are dequantised. Besides the weights that stay on it, the host holds one tensor at a time.

    Args:
      source: a folder, a .gguf file, a name on the hub, or "lab": the laboratory's model of 90,432 weights, which is
        part of this package.
      mesh: the devices. Without `shardings`, every leaf is replicated over them. By default leaves go to the default
        device.
      dtype: the dtype of every leaf, float32 by default.
      shardings: called with the path and shape of each leaf, such as "layers/attn/q/kernel" and (L, D, H·hd); returns
        the leaf's sharding.

    Returns:
      The model.

    Raises:
      FileNotFoundError: there is nothing to read.
      ValueError: a file is broken or does not match its known sha256, the config asks for something that is not
        implemented, or the keys do not fit the config (the message lists all of them).

    Examples:
      >>> load_model("lab", dtype=jnp.bfloat16).params["final_norm"]["scale"].dtype
      dtype(bfloat16)
    """
    path = resolve(source)
    if shardings is None and mesh is not None:
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        shardings = lambda path, shape: replicated  # noqa: E731
    naming: Literal["hf", "gguf"] = "gguf" if path.is_file() else "hf"
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    with _named(path):
        model, reader = _open(path)
        params = convert.to_params(reader, model.config, naming=naming, dtype=dtype, shardings=shardings)
    return dataclasses.replace(model, params=params, digest=digest(find_files(path)))


def load_outline(source: str | Path) -> Model:
    """Loads what `load_model(source)` does, without the weights: `params` is empty.

    The weight files must be there all the same.
    """
    path = resolve(source)
    with _named(path):
        return dataclasses.replace(_open(path)[0], digest=digest(find_files(path)))


def config_only(source: str | Path) -> TransformerConfig:
    """Reads the config of what `load_model(source)` would load. Its weights need not be there.

    Args:
      source: as for `load_model`.

    Returns:
      The config.

    Raises:
      FileNotFoundError: there is no config.
      ValueError: the config is broken, or asks for something that is not implemented.
    """
    path = resolve(source, weights=False)
    with _named(path):
        if path.is_file():
            return from_gguf(GGUFReader(path))
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} has no config.json: give a Hugging Face model folder or a .gguf file")
        return from_hf(_json(path / "config.json"))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make a ValueError name its model. An error that no check foresaw becomes a ValueError too."""
    try:
        yield
    except ValueError as error:
        if (path.name if path.is_file() else str(path)) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} has invalid fields ({error!r}): fetch the model again") from error


def save_model(
    path: str | Path,
    model: Model,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 * 10**9,
    card: str | None = None,
) -> None:
    """Writes a Hugging Face folder that `load_model` and transformers read: config, weights and tokenizer.

    The host holds one tensor at a time. The folder appears under its name when it is complete. All processes of a run
    call this. The first one writes, and all return when the folder is there.

    Args:
      path: the folder's name; it may exist if it is empty.
      model: what to write.
      dtype: the dtype of the weights in the files. By default each keeps its own.
      max_shard_bytes: the largest size of one weight file, at least 1 byte.
      card: the text of README.md. By default there is no such file.

    Raises:
      FileExistsError: `path` is a file, or a folder that is not empty.
      OSError: the folder cannot be made, or does not fit on its disk.
      ValueError: `max_shard_bytes` is below 1, or a weight is a number that `load_model` refuses, such as NaN.

    Examples:
      >>> lab = load_model("lab")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_model(f"{folder}/copy", lab)
      ...     copy = load_model(f"{folder}/copy")
      >>> bool((copy.params["embed"]["embedding"] == lab.params["embed"]["embedding"]).all())
      True
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}: it must be at least 1")
    dtype = jnp.dtype(model.params["embed"]["embedding"].dtype if dtype is None else dtype)
    shapes, tensor = convert.hf_tensors(model.params, config=model.config)
    check_new(path, nbytes=dtype.itemsize * sum(math.prod(shape) for shape in shapes.values()))
    if not processes.first():
        for key in shapes:
            tensor(key)  # every process has to send its part
        return processes.barrier()
    with _new_folder(path) as folder:
        ids = {name: getattr(model.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = {**to_hf(model.config), "dtype": str(dtype), "torch_dtype": str(dtype), **ids}
        generation = {**model.generation, **ids, "eos_token_id": list(model.stop_token_ids)}
        for name, fields in (("config", config), ("generation_config", generation)):
            fields = _with_rows(fields, model.config.vocab_size)
            (folder / f"{name}.json").write_text(json.dumps(fields, indent=2) + "\n")
        save_tokenizer(model.tokenizer, folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        safetensors.write_folder(folder, shapes, tensor, dtype=dtype, max_shard_bytes=max_shard_bytes)
    processes.barrier()


def _with_rows(fields: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The fields without the ids of tokens that the model's vocabulary lacks, such as a padding token that a loader
    added: transformers refuses a folder with them."""

    def kept(ids: Any) -> Any:
        if isinstance(ids, list):
            return [i for i in ids if i in range(rows)] or None
        return ids if ids in range(rows) else None

    return {name: kept(value) if name.endswith("_token_id") else value for name, value in fields.items()}


@contextlib.contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into. It gets its name if the block ends without an error, and is removed otherwise. What a
    killed process of this machine left of it is removed too."""
    path = Path(path).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{platform.node()}."
    for other in path.parent.iterdir():
        if other.name.startswith(prefix) and not _running(other.name.removeprefix(prefix)):
            shutil.rmtree(other, ignore_errors=True)
    partial = path.parent / f"{prefix}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, path)  # replaces an empty folder too
    except Exception as error:
        if not isinstance(error, OSError) and type(error) is not Exception:  # tokenizers raises it for a full disk
            raise
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} could not be written ({reason}): free some space, or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _running(pid: str) -> bool:
    """Whether the text is the id of another running process; True if it is not a number."""
    try:
        os.kill(int(pid), 0)
        return int(pid) != os.getpid()
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True


def check_new(path: str | Path, *, nbytes: int = 0) -> None:
    """Checks that a new folder can be made at `path`.

    All processes of a run call this. The first one looks, and all raise.

    Args:
      path: the folder's name.
      nbytes: how many bytes its disk has to have room for.

    Raises:
      FileExistsError: `path` is a file, or a folder that is not empty.
      OSError: it cannot be made, or its disk has too little room.
    """
    taken, problem = processes.exchange({0: _obstacle(path, nbytes)} if processes.first() else {})[0]
    if problem:
        raise FileExistsError(problem) if taken else OSError(problem)


def _obstacle(path: str | Path, nbytes: int) -> tuple[bool, str]:
    """Whether the name of a new folder is taken, and a sentence about the obstacle, "" if there is none."""
    path = Path(path).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        return True, f"{path} exists and is not an empty folder: choose another, or delete it"
    inside = next(parent for parent in path.parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=inside).close()
    except OSError as error:
        return False, f"{path} cannot be made ({inside}: {error.strerror}): choose another folder"
    free = shutil.disk_usage(inside).free
    if free < nbytes:
        room = f"{nbytes / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free"
        return False, f"{path} does not fit on its disk ({room}): free some space, or choose another folder"
    return False, ""


def _open(path: Path) -> tuple[Model, FileReader]:
    """The model without weights and digest, and a reader of its weights."""
    if path.is_file():
        gguf, generation = GGUFReader(path), {}
        config, words = from_gguf(gguf), from_gguf_metadata(gguf.metadata)
        ends = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        stops = [tokenizer.check_token_ids(gguf.metadata.get(name), f"{path}: {name}") for name in ends]
        gguf.metadata.clear()  # a hundred thousand strings that the tokenizer now holds
        reader: FileReader = gguf
    else:
        config, reader = config_only(path), safetensors.SafetensorsReader(find_files(path))
        generation = _json(path / "generation_config.json")
        files = {"config.json": _json(path / "config.json"), "generation_config.json": generation}
        stops = [
            tokenizer.check_token_ids(fields.get("eos_token_id"), f"{path / name}: eos_token_id")
            for name, fields in files.items()
        ]
        words = tokenizer.from_folder(path)
    return Model(config, {}, words, "", tokenizer.stop_token_ids(words, *stops), generation), reader


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the model again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds {type(fields).__name__} instead of fields and values: fetch the model again")
    return fields
