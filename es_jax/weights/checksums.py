"""sha256 of weight files: the digest that names a model, and known sums of its files, by which flipped bits show.

A sum is known of what `save_model` wrote (SHA256SUMS, as the program sha256sum writes and checks it) and of what
huggingface_hub fetched: its cache names files by their sums, its download folders keep them beside the files.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

SUMS = "SHA256SUMS"
_SUM = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20  # bytes that are read at once


def digest(files: Iterable[Path]) -> str:
    """sha256, in hex, of the files' bytes one after another in the order of their names.

    Raises ValueError that lists every file whose own sum is not the one that is known of it.
    """
    files, total, damaged = sorted(files), hashlib.sha256(), []
    for path in files:
        known = known_sum(path)
        own = total if len(files) == 1 else hashlib.sha256()
        sums = [total, own] if known and own is not total else [total]
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                for each in sums:
                    each.update(chunk)
        if known and own.hexdigest() != known[0]:
            damaged.append(f"{path} differs from its sha256 in {known[1]}")
    if damaged:
        found = "; ".join(damaged)
        raise ValueError(f"{found}: damaged, so fetch or export it again; if changed on purpose, delete the sum")
    return total.hexdigest()


def known_sum(path: Path) -> tuple[str, Path] | None:
    """(sha256 in hex, where it stands) of a file, or None when there is none, or none that is newer than the file."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SUM.fullmatch(blob.name):
        return blob.name, blob
    listed = path.parent / SUMS
    if listed.exists():
        found = _listed(listed).get(path.name)
        return (found, listed) if found else None
    fetched = path.parent / ".cache/huggingface/download" / f"{path.name}.metadata"
    if fetched.exists():
        lines = fetched.read_text(encoding="utf-8").split()
        if len(lines) == 3 and _SUM.fullmatch(lines[1]) and path.stat().st_mtime - 1 <= float(lines[2]):
            return lines[1], fetched
    return None


def _listed(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line) for line in lines if line.strip()]
    if None in found:
        raise ValueError(f"{path} is damaged: fetch or export the model again, or delete it")
    return {match[2]: match[1].lower() for match in found if match}


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """SHA256SUMS of the folder: file → sha256 in hex."""
    text = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    (folder / SUMS).write_text(text, encoding="utf-8")
