"""The law of sums: what a run rests on is what was written, or reading it is an error that names it."""

import json
import re
import shutil

import numpy as np
import pytest

from es_jax.evals.export_step import export_run
from es_jax.evals.runner import evaluate_run
from es_jax.training.loop import run
from es_jax.training.weights_at import replay, weights_at
from tests.helpers import STEPS, config_of, edit_config, same


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    return tmp_path / "run"


def last(workdir, **how):
    ((_, params),) = weights_at(workdir, [STEPS], **how)
    return params


def change(path, pattern, by):
    text = path.read_text()
    other = re.sub(pattern, by, text, count=1)
    assert other != text
    path.write_text(other)


@pytest.mark.parametrize(
    "pattern", [r'(?<="seeds": \[)\d', r'(?<="weights": \[)-?\d', r'(?<="learning_rate": 0\.)\d', r'(?<="sum": ")\w']
)
def test_a_changed_digit_of_the_seed_log_is_refused(pattern, copy):
    change(copy / "seedlog.jsonl", pattern, lambda match: "7" if match[0][-1] != "7" else "8")
    with pytest.raises(
        ValueError, match=r"seedlog\.jsonl line 1 cannot be read \(its numbers do not match its checksum\)"
    ):
        last(copy, checkpoints=False)


def test_a_log_line_written_otherwise_or_without_its_sum_is_the_same_step(whole, copy):
    lines = [json.loads(line) for line in (copy / "seedlog.jsonl").read_text().splitlines()]
    del lines[0]["sum"]  # as earlier versions wrote it
    (copy / "seedlog.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    assert same(last(copy, checkpoints=False), whole[2])


@pytest.mark.parametrize(
    ("pattern", "by"),
    [(r'"penalty": "l2"', '"penalty": "l1"'), (r'"seed": 0', '"seed": 1'), ('"digest": "', '"digest": "0')],
)
def test_a_changed_field_of_a_runs_config_is_refused_unless_its_sum_is_gone(pattern, by, whole, copy):
    change(copy / "config.json", pattern, by)
    for read in (
        lambda: last(copy, checkpoints=False),
        lambda: run(whole[0], copy),
        lambda: export_run(copy, copy / "out"),
    ):
        with pytest.raises(
            ValueError, match=r"config\.json does not match its field sha256: restore the file, or delete"
        ):
            read()


def test_a_runs_config_that_was_changed_on_purpose_is_read(whole, copy):
    edit_config(copy, train={"samples": 3})
    assert same(last(copy, checkpoints=False), whole[2])


def test_every_file_of_a_checkpoint_is_held_against_its_sum(whole, copy):
    folder = copy / "ckpt" / str(STEPS)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) > 5
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(OSError, match=rf"checkpoint of step {STEPS} in .*(changed since|No such file)"):
            last(copy)
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    for sums in folder.glob("sums.*.json"):
        sums.unlink()  # as in a checkpoint of an earlier version
    assert same(last(copy), whole[2])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "added_tokens.json"])
def test_a_run_is_of_the_model_files_that_it_began_with(name, tiny_model, tmp_path):
    model, workdir = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model, model)
    config = config_of(model, train={"steps": 1}, evals={"every": 0})
    run(config, workdir)
    file = model / name
    file.write_text((file.read_text() if file.exists() else "{}") + "\n")
    says = rf"{re.escape(name)} of model\.source .* changed since .*: restore it"
    for read in (
        lambda: next(replay(workdir)),
        lambda: evaluate_run(workdir, tasks=["lab-add"]),
        lambda: export_run(workdir, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=says):
            read()
    with pytest.raises(ValueError, match=rf"files\.{re.escape(name)} was .* and is"):
        run(config, workdir)
    edit_config(workdir, files=None)  # a run of an earlier version goes on, and keeps the sums from then on
    assert run(config, workdir).step == 1 and json.loads((workdir / "config.json").read_text())["files"][name]


def test_held_out_rows_that_changed_are_refused_when_the_run_goes_on(tiny_model, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "reward_model": {"ground_truth": str(i)}} for i in range(4)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tiny_model, task={"data_dir": str(tmp_path)}, train={"steps": 1}, evals={"every": 1})
    run(config, tmp_path / "run")
    change(tmp_path / "test.jsonl", '"ground_truth": "1"', '"ground_truth": "5"')
    with pytest.raises(ValueError, match=r"the held-out rows of conciseness, .*, although the fields of evals did not"):
        run(config, tmp_path / "run")


def test_an_anchor_that_is_another_model_is_not_replayed_to(tiny_model, tmp_path):
    from es_jax.weights.model import load_model, save_model

    anchor = {"penalty": "l2", "strength": 20.0, "kappa": None, "source": str(tmp_path / "anchor")}
    shutil.copytree(tiny_model, tmp_path / "anchor")
    run(config_of(tiny_model, optim={"anchor": anchor}, train={"steps": 1}, evals={"every": 0}), tmp_path / "run")
    shutil.rmtree(tmp_path / "anchor")
    model = load_model(tiny_model)
    model.params["final_norm"]["scale"] = np.asarray(model.params["final_norm"]["scale"]) * np.float32(2)
    save_model(tmp_path / "anchor", model)
    with pytest.raises(
        ValueError, match=r"optim\.anchor\.source .*anchor' does not have the weights that .* was trained from"
    ):
        next(replay(tmp_path / "run", steps=[1]))
