"""The files of a model: where they are, here or on the hub, which ones hold weights, and whether they are whole.

A sha256 is known of what `save_model` wrote (SHA256SUMS, as the program sha256sum writes it) and of what
huggingface_hub fetched: its cache names files by their sums, its download folders keep them beside the files.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUMS = "SHA256SUMS"
_SUM = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20  # bytes that are read at once
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"]  # of a hub repository's files
# What says what the weights mean: config, tokenizer, chat template.
SMALL = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "tokenizer.model",
)


def resolve(source: str | Path, *, weights: bool = True) -> Path:
    """The folder or .gguf file of `source`: a path, a hub name, or "lab", the model that es_jax brings along.

    Of the hub's files, without `weights` only those in JSON are fetched, unless they are in its cache.
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
    """The weight files of a Hugging Face folder: every shard of the index, or model.safetensors; a file is its own."""
    if folder.is_file():
        return (folder,)
    if (folder / INDEX).exists():
        names = _indexed(folder / INDEX)
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"{folder}: shards named in {INDEX} are missing: {', '.join(missing)}")
        return tuple(folder / name for name in names)
    if (folder / SINGLE).exists():
        return (folder / SINGLE,)
    if any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has weights only as .bin files, which are pickles and are not read; convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    inside = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; it has {', '.join(inside)}: give the path of one of them" if inside else ""
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")


def _indexed(path: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): fetch the model again") from None
    if outside:
        raise ValueError(f"{path} names files outside its folder ({', '.join(outside)}): fetch the model again")
    return names


def digest(files: Iterable[Path]) -> str:
    """sha256, in hex, of the files' bytes in the order of their names; each file is held against its own known sum."""
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
        remedy = "damaged, so fetch or export it again; if changed on purpose, delete the sum"
        raise ValueError(f"{'; '.join(damaged)}: {remedy}")
    return total.hexdigest()


def small_sums(source: str | Path) -> dict[str, str | None]:
    """sha256 in hex of each of SMALL in a model folder, None where it is not there. A .gguf file has none of them: it
    is one file, whose sum is the model's digest."""
    folder = resolve(source)
    paths = [folder / name for name in SMALL if folder.is_dir()]
    return {path.name: digest([path]) if path.is_file() else None for path in paths}


def known_sum(path: Path) -> tuple[str, Path] | None:
    """(sha256 in hex, where it stands) of a file, or None when there is none, or none that is newer than the file."""
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
