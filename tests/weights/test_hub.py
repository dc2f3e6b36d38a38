"""Names of models on the hub: found in the cache, fetched, or one sentence about why not. No test asks the hub."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from es_jax.weights.files import resolve
from es_jax.weights.model import config_only, load_model


def raising(error):
    def snapshot_download(*args, **kwargs):
        raise error

    return snapshot_download


def http(kind):
    httpx = pytest.importorskip("httpx2" if "httpx2" in errors.HTTPError.__module__ else "httpx")
    return kind("401 Client Error\nand more", response=httpx.Response(401, request=httpx.Request("GET", "https://hub")))


FAILURES = {
    "gated": (lambda: http(errors.GatedRepoError), PermissionError, "accept them on the model's page and log in"),
    "not found": (lambda: http(errors.RepositoryNotFoundError), FileNotFoundError, "no such model, or a private one"),
    "server": (
        lambda: http(errors.HfHubHTTPError),
        FileNotFoundError,
        r"\(401 Client Error\): try again",
    ),
    "disk": (lambda: OSError(28, "No space left"), FileNotFoundError, "No space left"),
    "name": (lambda: errors.HFValidationError("bad name"), FileNotFoundError, "bad name"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_one_sentence_for_each_failure(failure, monkeypatch):
    make, kind, says = FAILURES[failure]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(make()))
    with pytest.raises(kind, match=says) as caught:
        load_model("someone/something")
    text = str(caught.value)
    assert "someone/something" in text and "download the model and give its folder" in text and "\n" not in text


@pytest.mark.parametrize(("offline", "says"), [(True, "HF_HUB_OFFLINE is set: unset it"), (False, "check the network")])
def test_offline_and_not_in_the_cache(offline, says, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(errors.LocalEntryNotFoundError("many\nlines")))
    with pytest.raises(FileNotFoundError, match=says) as caught:
        load_model("someone/something")
    assert "\n" not in str(caught.value)


def test_the_library_itself_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not in the hub's cache, and HF_HUB_OFFLINE is set"):
        load_model("someone/no-such-model-anywhere")


def test_only_what_is_needed_is_asked_for(tiny_model, monkeypatch):
    calls = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        calls.append((name, allow_patterns, ignore_patterns))
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert config_only("someone/something") == load_model("someone/something").config
    (first, patterns, skip), second = calls  # the weights are asked for once
    assert first == "someone/something" and patterns == ["*.json"] and "*.safetensors" in second[1]
    assert skip == second[2] == ["*/*"] and not any(p.endswith((".bin", ".pt", ".py")) for p in second[1])


def test_a_snapshot_in_the_cache_is_found_offline(tiny_model, tmp_path, monkeypatch):
    """The cache's own layout: refs/main names a commit, snapshots/<commit> holds the files."""
    repo = tmp_path / "models--someone--something"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / ("0" * 40)).symlink_to(tiny_model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_model("someone/something").config == load_model(tiny_model).config


@pytest.mark.parametrize("source", ["a/b/c", "nothing here", "../up", "someone/m.gguf"])
def test_what_is_no_name_is_not_asked_for(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(AssertionError("the hub was asked")))
    with pytest.raises(FileNotFoundError, match=r"is not a folder, a \.gguf file or a hub name"):
        resolve(source)
