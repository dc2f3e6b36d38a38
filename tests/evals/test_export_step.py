"""A run's step as a Hugging Face folder: transformers reads it whole, and it is the step, bit for bit."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.core.tree import named_leaves
from es_jax.evals.export_step import export_run
from es_jax.generate.engine import Engine
from es_jax.training.loop import run
from es_jax.training.weights_at import replay
from es_jax.weights.model import load_model
from es_jax.weights.tokenizer import encode_prompt
from tests.helpers import config_of, edit_config, same

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [{"role": "user", "content": "say it"}]


@pytest.fixture(scope="module")
def workdir(tiny_model, tmp_path_factory):
    """A run of three steps with a checkpoint of the last two."""
    fields = {
        "task": {"name": "conciseness", "train_size": 2},
        "es": {"population": 4, "sigma": 0.05},
        "optim": {"learning_rate": 0.02, "anchor": {"penalty": "l2", "kappa": 1.0}},
        "decode": {"max_prompt_tokens": 160, "max_new_tokens": 2, "slots": 2},
        "train": {"steps": 3, "checkpoint_every": 2, "keep_checkpoints": 2},
        "evals": {"every": 3, "rows": 2},
    }
    folder = tmp_path_factory.mktemp("run")
    run(config_of(tiny_model, fields), folder)
    return folder


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("step", "source"), [(3, "checkpoint"), (2, "checkpoint"), (1, "replay"), (0, "replay")])
def test_any_step_is_exported_as_it_was(step, source, workdir, tmp_path):
    before = everything(workdir)
    result = export_run(workdir, tmp_path / "out", step=step)
    assert (result["source"], result["step"], result["dtype"], result["files"]) == (source, step, "float32", 1)
    ((_, params),) = replay(workdir, steps=[step])
    assert same(load_model(tmp_path / "out").params, params)
    assert everything(workdir) == before and os.listdir(tmp_path) == ["out"]


def test_checkpoint_and_replay_give_the_same_folder(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt")
    assert export_run(tmp_path / "run", tmp_path / "replayed")["source"] == "replay"
    assert export_run(workdir, tmp_path / "restored")["source"] == "checkpoint"
    names = sorted(os.listdir(tmp_path / "replayed"))
    assert names == sorted(os.listdir(tmp_path / "restored"))
    for name in names:
        assert (tmp_path / "replayed" / name).read_bytes() == (tmp_path / "restored" / name).read_bytes(), name


def test_transformers_reads_it_whole_and_decodes_the_same(workdir, tiny_model, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert export_run(workdir, out, max_shard_bytes=9000)["files"] > 2
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_model(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == load_model(tiny_model).tokenizer.chat_template
    ids = encode_prompt(tokenizer, PROMPT)
    assert ids == encode_prompt(ours.tokenizer, PROMPT)
    made = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :].tolist()
    engine = Engine(
        ours.config, slots=1, max_prompt_tokens=len(ids), max_new_tokens=24, stop_token_ids=ours.stop_token_ids
    )
    generation = engine.generate(ours.params, [ids])
    assert made == np.asarray(generation.tokens)[0, : int(generation.length[0])].tolist() and len(set(made)) > 3


def test_the_card_says_where_the_weights_come_from(workdir, tiny_model, tmp_path):
    export_run(workdir, tmp_path / "out", dtype="bfloat16")
    text = (tmp_path / "out/README.md").read_text()
    facts = json.loads((workdir / "config.json").read_text())
    evals = json.loads((workdir / "evals/conciseness.jsonl").read_text().splitlines()[-1])
    for part in (facts["digest"], str(tiny_model), "step | 3 of 3", "run seed | 0", json.dumps(evals), "bfloat16"):
        assert part in text
    assert json.loads(text.split("```json\n")[1].split("\n```")[0])["config"] == facts["config"]
    assert load_model(tmp_path / "out", dtype=jnp.bfloat16).params["embed"]["embedding"].dtype == jnp.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(workdir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"step is 4, but .* has only steps 0 to 3"):
        export_run(workdir, tmp_path / "out", step=4)
    with pytest.raises(FileNotFoundError, match="is not a run's directory"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_run(workdir, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    with pytest.raises(OSError, match=r"mine\.txt/out cannot be made \(.*Not a directory\): choose another folder"):
        export_run(workdir, tmp_path / "full/mine.txt/out")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        patched.setattr("es_jax.evals.export_step.weights_at", lambda *a, **k: pytest.fail("long work began"))
        with pytest.raises(OSError, match=r"does not fit on its disk \(0\.000 GB are needed, 0\.000 GB are free\)"):
            export_run(workdir, tmp_path / "out", step=1)
    shutil.copytree(workdir, tmp_path / "other")
    edit_config(tmp_path / "other", digest="0" * 64)
    with pytest.raises(ValueError, match="digests differ"):
        export_run(tmp_path / "other", tmp_path / "out")
    monkeypatch.setattr("es_jax.weights.safetensors._write", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(workdir, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["full", "other"]  # no folder, and no part of one


def test_a_damaged_checkpoint_is_named(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    for file in (tmp_path / "run/ckpt/3/default").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(OSError, match=r"checkpoint of step 3 in .* cannot be restored"):
        export_run(tmp_path / "run", tmp_path / "out")


def test_two_processes_load_their_parts_and_export_together(workdir, tiny_model, tmp_path):
    """Four devices of two processes: each holds its own slices, bit for bit; the first writes, what one would have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.evals.export_process"]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    given = [port, str(tiny_model), str(workdir), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(rank), *given], cwd=ROOT, env=env, **pipes) for rank in range(2)]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "".join(err[-2000:] for _, err in ended)
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in ended)
    whole = dict(named_leaves(load_model(tiny_model).params))
    for name, leaf in whole.items():
        parts = [bytes.fromhex(part) for held in (first, second) for part in held["held"][name]]
        columns = np.split(np.asarray(leaf), len(parts), axis=-1) if len(parts) == 4 else [np.asarray(leaf)] * 2
        assert parts == [np.ascontiguousarray(column).tobytes() for column in columns], name
    assert first["there"] == second["there"] and "model.safetensors.index.json" in first["there"]
    assert first["results"] == second["results"] and [r["source"] for r in first["results"]] == ["replay", "checkpoint"]
    assert "exists and is not an empty folder" in first["refused"] and first["refused"] == second["refused"]
    assert same(load_model(tmp_path / "saved").params, load_model(tiny_model).params)
    for step in (1, 3):
        export_run(workdir, tmp_path / f"alone{step}", step=step)
        for file in (tmp_path / f"alone{step}").iterdir():
            assert file.read_bytes() == (tmp_path / f"step{step}" / file.name).read_bytes(), file.name


def test_the_command(workdir, tmp_path):
    command = [sys.executable, "-m", "es_jax.export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--json"]
    env = os.environ | {"XLA_FLAGS": ""}
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["step"] == 3 and result["files"] == 1 and (tmp_path / "out/README.md").exists()
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert out.returncode == 1 and out.stderr.strip().startswith("es_jax.export: ") and "Traceback" not in out.stderr
