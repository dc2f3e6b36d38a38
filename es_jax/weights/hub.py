"""Where the files of a model are: here, or on the hub and then in its local cache."""

import re
from pathlib import Path

_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "merges.txt",
    "tokenizer.model",
)


def resolve(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder or .gguf file of `source`; "lab" is the laboratory model that es_jax brings along; a hub name is
    fetched, or found in the local hub cache.

    Raises FileNotFoundError when it is neither here nor to be had, and says why; PermissionError when the hub gives it
    only to those who asked for it; ValueError for a file of another kind.
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
    return _fetch(str(source), [name for name in _FILES if weights or name == "*.json"])


def _fetch(name: str, files: list[str]) -> Path:
    """The cached snapshot of a hub repository, one sentence for each way in which there is none."""
    import huggingface_hub
    from huggingface_hub import errors

    local = "or download the model and give its folder"
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"the hub gives {name!r} only to accounts that have accepted its terms: accept them on the model's page "
            f"and log in with `hf auth login`, {local}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"source = {name!r} is no local folder, and the hub has no such model, or a private one: check the name, "
            f"log in with `hf auth login`, {local}"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        remedy = "unset it" if offline else "check the network"
        raise FileNotFoundError(
            f"source = {name!r} is no local folder and not in the hub's cache, and {reason}: {remedy}, {local}"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"source = {name!r} is no local folder and the hub did not give it ({reason}): try again, {local}"
        ) from error
