"""A flipped bit that leaves a number ordinary is found where the file's sha256 is known."""

import hashlib
import os
import shutil
import subprocess

import pytest

from es_jax.weights.files import SUMS, digest, known_sum
from es_jax.weights.model import load_model, load_outline, save_model


@pytest.fixture
def folder(tiny_model, tmp_path):
    save_model(tmp_path / "m", load_model(tiny_model), max_shard_bytes=15_000)
    return tmp_path / "m"


def flip(path):
    """The lowest bit of the last number, which stays as ordinary as it was."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def test_what_is_written_can_be_checked_by_sha256sum(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1 and [known_sum(path)[0] for path in shards] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in shards
    ]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=folder, check=True)


@pytest.mark.parametrize("load", [load_model, load_outline])
def test_a_flipped_bit_of_a_number_is_refused(load, folder):
    names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    load(folder)
    for name in (names[0], names[-1]):
        flip(folder / name)
    with pytest.raises(
        ValueError, match=rf"{names[0]} differs from its sha256.*{names[-1]} differs.*delete its sha256"
    ):
        load(folder)
    (folder / SUMS).unlink()
    load(folder)  # nothing is known of it any more


def test_files_of_the_hub(folder, tmp_path):
    """The cache names its files by their sums; a download folder keeps them in metadata beside the files."""
    (tmp_path / "blobs").mkdir()
    file = sorted(folder.glob("*.safetensors"))[0]
    (folder / SUMS).unlink()
    value = hashlib.sha256(file.read_bytes()).hexdigest()
    assert known_sum(file) is None
    aside = folder / ".cache/huggingface/download"
    aside.mkdir(parents=True)
    changed = file.stat().st_mtime
    for text, known in [(f"commit\n{value}\n{changed}\n", True), (f"commit\n{value}\n{changed - 9}\n", False)]:
        (aside / f"{file.name}.metadata").write_text(text)  # older than the file: it was changed since
        assert (known_sum(file) is not None) == known
    (aside / f"{file.name}.metadata").write_text(f"commit\n{value[:40]}\n{changed}\n")
    assert known_sum(file) is None  # a git hash
    os.replace(file, tmp_path / "blobs" / value)
    file.symlink_to(tmp_path / "blobs" / value)
    assert known_sum(file)[0] == value and digest([file]) == value
    flip(tmp_path / "blobs" / value)
    with pytest.raises(ValueError, match=f"differs from its sha256 in .*blobs/{value}: fetch or export"):
        digest([file])
