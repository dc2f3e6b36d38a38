"""The files of a model: where they are, locally or on the hub, which ones hold weights, and whether they are undamaged.

A sha256 is known for files that `save_model` wrote (in SHA256SUMS, the format of the program sha256sum) and for files
that huggingface_hub fetched: its cache names files by their sha256, and its download folders keep it next to the files.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUMS = "SHA256SUMS"
ADAPTER = "adapter_config.json"  # of peft
_SUM = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20  # bytes read at once
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"]  # files of a hub repository
# The files that define what the weights mean: config, tokenizer, chat template.
SMALL = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "tokenizer.model",
)


logger = logging.getLogger(__name__)


def resolve(source: str | Path, *, weights: bool = True) -> Path:
    """The folder or .gguf file of `source`: a path, a hub name, or "lab", the model that es_jax includes.

    Without `weights` only the JSON files are fetched from the hub, unless the cache has them.
    """
    if str(source) == "lab":
        return Path(__file__).parent / "lab"
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"source = {str(source)!r} is a file but not a .gguf file: give the folder it is in")
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) or path.suffix == ".gguf":
        raise FileNotFoundError(f"source = {str(source)!r} is not a folder, a .gguf file or a hub name (owner/name)")
    return _fetch(str(source), _PATTERNS if weights else ["*.json"])


def _fetch(name: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    local = "or download the model and give its folder"
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"the hub gives {name!r} only to accounts that have accepted its terms: accept them on the model's page "
            f"and log in with `hf auth login`, {local}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"source = {name!r} is not a local folder, and the hub has no such model, or a private one: check the "
            f"name, log in with `hf auth login`, {local}"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        remedy = "HF_HUB_OFFLINE is set: unset it" if offline else "the hub cannot be reached: check the network"
        raise FileNotFoundError(
            f"source = {name!r} is not a local folder and not in the hub's cache, and {remedy}, {local}"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"source = {name!r} is not a local folder and the hub did not give it ({reason}): try again, {local}"
        ) from error


def find_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a Hugging Face folder, chosen as by transformers: model.safetensors, or every shard of the
    index. For a single file it is that file. A warning names shards that are not read."""
    if folder.is_file():
        return (folder,)
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER}), which changes the weights and is not read: merge it into its "
            "base model (peft: merge_and_unload().save_pretrained(new_folder)), or delete its files to use only the "
            "base weights"
        )
    shards = frozenset(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if (folder / SINGLE).exists():
        _not_read(folder, shards, SINGLE)
        return (folder / SINGLE,)
    if (folder / INDEX).exists():
        names = sorted({*weight_map([folder / INDEX]).values()})
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"{folder}: shards named in {INDEX} are missing: {', '.join(missing)}")
        _not_read(folder, shards.difference(names), f"what {INDEX} names")
        return tuple(folder / name for name in names)
    if any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has weights only as .bin files, which are pickles and are not read: if you trust them, convert "
            "them by AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    inside = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; it has {', '.join(inside)}: give the path of one of them" if inside else ""
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")


@functools.cache  # it is said once
def _not_read(folder: Path, shards: frozenset[str], chosen: str) -> None:
    if shards:
        logger.warning("%s: %s is read, as transformers does; not read: %s", folder, chosen, ", ".join(sorted(shards)))


def weight_map(files: Sequence[Path]) -> dict[str, str]:
    """The file that holds each tensor, according to the index; {} if there is none."""
    path = files[0].parent / INDEX
    if not path.exists():
        return {}
    try:
        file_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = sorted({name for name in file_of.values() if Path(name).name != name})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): fetch the model again") from None
    if outside:
        raise ValueError(f"{path} names files outside its folder ({', '.join(outside)}): fetch the model again")
    return file_of


def digest(files: Iterable[Path]) -> str:
    """sha256, in hex, of the files' bytes in the order of their names; each file is checked against its own known
    sha256."""
    files, total, damaged = sorted(files), hashlib.sha256(), []
    for path in files:
        known, own = known_sum(path), total if len(files) == 1 else hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                for each in {total, own} if known else {total}:
                    each.update(chunk)
        if known and own.hexdigest() != known[0]:
            damaged.append(f"{path} differs from its sha256 in {known[1]}")
    if damaged:
        remedy = "fetch or export the damaged file again; if you changed it on purpose, delete its sha256"
        raise ValueError(f"{'; '.join(damaged)}: {remedy}")
    return total.hexdigest()


def small_sums(source: str | Path) -> dict[str, str | None]:
    """sha256 in hex of each of SMALL in a model folder, None for a file that does not exist. A .gguf file has none of
    them: it is a single file, whose sha256 is the model's digest."""
    folder = resolve(source)
    paths = [folder / name for name in SMALL if folder.is_dir()]
    return {path.name: digest([path]) if path.is_file() else None for path in paths}


def known_sum(path: Path) -> tuple[str, Path] | None:
    """(sha256 in hex, where it is recorded) of a file, or None if no record is newer than the file."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SUM.fullmatch(blob.name):
        return blob.name, blob
    listing, metadata = path.parent / SUMS, path.parent / ".cache/huggingface/download" / f"{path.name}.metadata"
    if listing.exists():
        lines = filter(str.strip, listing.read_text(encoding="utf-8", errors="replace").splitlines())
        matches = [re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line) for line in lines]
        if None in matches:
            raise ValueError(f"{listing} is damaged: fetch or export the model again, or delete it")
        sums = {match[2]: match[1].lower() for match in matches if match}
        return (sums[path.name], listing) if path.name in sums else None
    if metadata.exists():
        fields = metadata.read_text(encoding="utf-8").split()
        if len(fields) == 3 and _SUM.fullmatch(fields[1]) and path.stat().st_mtime - 1 <= float(fields[2]):
            return fields[1], metadata
    return None
