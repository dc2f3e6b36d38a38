"""What a kill or damage leaves in a run's directory: gone with the next start, or refused by name."""

import dataclasses
import json
import logging
import shutil
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from es_jax.rundir import directory
from es_jax.rundir.checkpoints import Checkpoints, abstract, restore_params, saved_steps
from es_jax.rundir.metrics import Jsonl
from es_jax.scoring.row_results import read_evals
from es_jax.training.config import freeze, read_config
from es_jax.training.loop import run
from tests.helpers import TWO_STEPS, config_of

FIELDS = TWO_STEPS | {"train": {"steps": 2, "checkpoint_every": 5}}
NOISE = np.random.default_rng(0).standard_normal((40, 14), np.float32)  # what is small or compresses well has no file
TREE = {f"w{i}": jnp.asarray(NOISE[:, : i + 8]) for i in range(6)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory with checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (1, 2):
        checkpoints.save(step, TREE, {"m": jnp.zeros(3)})
    checkpoints.close()
    return workdir


def test_who_only_reads_is_not_warned_of_it(saved, caplog):
    level = logging.getLogger("absl").level
    assert saved_steps(saved) == [1, 2]
    restore_params(saved, 1, abstract(TREE))
    assert not caplog.records and logging.getLogger("absl").level == level


def one(folder: Path, pattern: str) -> Path:
    """The largest of the files."""
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "an empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "no content": lambda folder: shutil.rmtree(folder / "default"),
    "files in the middle": lambda folder: shutil.rmtree(folder / "default/d"),
    "a file of arrays": lambda folder: one(folder / "default/ocdbt.process_0", "d/*").unlink(),
    "half of the arrays": lambda folder: cut(one(folder / "default/ocdbt.process_0", "d/*")),
    "half of the metadata": lambda folder: cut(folder / "default/_METADATA"),
    "metadata of another shape": lambda folder: (folder / "default/_METADATA").write_text("{}"),
    "half of the sums": lambda folder: cut(folder / "sums.0.json"),
}


def without_sums(workdir: Path) -> None:
    """As an earlier version left it, or a process that was killed just then."""
    for path in workdir.rglob("sums.*.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "sums"), [*((name, True) for name in DAMAGE), *((name, False) for name in DAMAGE if name[-4:] != "sums")]
)
def test_a_damaged_checkpoint_is_named_and_nothing_comes_after(damage, sums, saved, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    if not sums:
        without_sums(workdir)
    DAMAGE[damage](workdir / "ckpt/2")
    checkpoints = Checkpoints(workdir, keep=2)
    like = abstract((TREE, {"m": jnp.zeros(3)}))
    with pytest.raises(OSError) as error:
        checkpoints.restore(2, *like)
    checkpoints.close()
    says = str(error.value)
    assert says.startswith(f"the checkpoint of step 2 in {workdir}/ckpt/2 cannot be restored (") and "\n" not in says
    assert says.endswith(": delete that folder, and the run goes on from an older one or from the seed log")
    assert "Composite" not in says and "strict=False" not in says
    shutil.rmtree(workdir / "ckpt/2")
    checkpoints = Checkpoints(workdir, keep=2)
    assert checkpoints.latest() == 1
    params, _ = checkpoints.restore(1, *like)
    assert all(np.array_equal(params[name], TREE[name]) for name in TREE)
    assert "Event loop is closed" not in capfd.readouterr().err


def test_tracebacks_of_reads_that_end_later_are_not_printed(saved, tmp_path, monkeypatch):
    printed: list = []
    event = lambda error: types.SimpleNamespace(exc_value=error, object=None)  # noqa: E731
    closed, other = event(RuntimeError("Event loop is closed")), event(RuntimeError("something else"))
    print_event = printed.append
    monkeypatch.setattr(sys, "unraisablehook", print_event)
    restore_params(saved, 2, abstract(TREE))
    assert sys.unraisablehook is print_event
    shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt/2/default/d")
    with pytest.raises(OSError, match=r"No such file or directory: '.*/default/d/"):
        restore_params(tmp_path / "run", 2, abstract(TREE))
    for one_event in (closed, other):
        sys.unraisablehook(one_event)
    assert printed == [other]


@pytest.mark.parametrize("flipped", ["default/ocdbt.process_0/d/*", "default/d/*", "_CHECKPOINT_METADATA"])
def test_a_changed_bit_is_not_other_weights(flipped, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    flip(one(tmp_path / "run/ckpt/2", flipped))
    with pytest.raises(OSError, match=r"checkpoint of step 2 in .* is not what was written"):
        restore_params(tmp_path / "run", 2, abstract(TREE))


def test_weights_of_another_shape_are_refused(saved):
    other = abstract({name: jnp.zeros((40, 3)) for name in TREE})
    with pytest.raises(
        OSError, match=r"Requested shape: \(40, 3\) is not compatible with the stored shape: \(40, \d+\)\)"
    ):
        restore_params(saved, 2, other)


@pytest.mark.parametrize(
    "name", ["37.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17000", "sums.orbax-checkpoint-tmp"]
)
def test_the_folder_of_a_killed_save_goes_with_the_next_start(name, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    (workdir / "ckpt" / name / "default").mkdir(parents=True)
    assert saved_steps(workdir) == [1, 2] and (workdir / "ckpt" / name).exists()  # who only reads removes nothing
    Checkpoints(workdir, keep=2).close()
    assert sorted(path.name for path in (workdir / "ckpt").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("then", ["a start", "a save"])
def test_what_another_process_may_be_saving_stays_until_that_is_gone(then, tmp_path):
    mine, other = Checkpoints(tmp_path, keep=2), Checkpoints(tmp_path, keep=2)
    unfinished = tmp_path / "ckpt/7.orbax-checkpoint-tmp/default"
    unfinished.mkdir(parents=True)
    Checkpoints(tmp_path, keep=2).close()
    mine.save(1, TREE, {})
    assert unfinished.exists()
    other.close()
    if then == "a start":
        mine.close()
        Checkpoints(tmp_path, keep=2).close()
    else:
        mine.save(2, TREE, {})
    assert not unfinished.parent.exists() and saved_steps(tmp_path)[0] == 1


def test_what_another_process_writes_stays(tiny_model, tmp_path):
    unfinished = [tmp_path / "ckpt/7.orbax-checkpoint-tmp", tmp_path / "config.tmp"]
    unfinished[0].mkdir(parents=True)
    with directory.claim(tmp_path):
        unfinished[1].touch()
        with pytest.raises(OSError, match="in use by another process"):
            run(config_of(tiny_model, FIELDS), tmp_path)
        assert all(path.exists() for path in unfinished)
    with directory.claim(tmp_path):
        assert not unfinished[1].exists()


@pytest.mark.parametrize("content", ["", '{"config": {"train"', "\0" * 40, "[]"])
def test_a_cut_config_is_taken_over_before_the_first_step_and_refused_after_it(content, tmp_path):
    config = dataclasses.asdict(freeze({}))
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        directory.settle(tmp_path, config, identity={"digest": "0"}, started=True)
    assert (tmp_path / "config.json").read_text() == content
    directory.settle(tmp_path, config, identity={"digest": "0"}, started=False)
    assert read_config(tmp_path) == freeze({})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("3", "it has no step"),
        ('{"reward": 1}', "it has no step"),
        ('{"step": "2"}', "it has no step"),
        ("{]", "Expecting"),
    ],
)
def test_a_damaged_line_of_rows_is_named(line, says, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    for read in (Jsonl, read_evals):
        with pytest.raises(ValueError, match=f"line 2 cannot be read .*{says}.*: restore or delete the file"):
            read(path)


def test_steps_fewer_more_and_as_many_as_are_finished(tiny_model, tmp_path, caplog, capfd):
    def go(steps, **groups):
        return run(config_of(tiny_model, FIELDS, train={"steps": steps}, **groups), tmp_path)

    linear = {"optim": {"schedule": "linear:0.1"}}
    go(2, **linear)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != ".lock"}
    says = r"train\.steps is 1 but .* has 2 finished steps: set train\.steps to 2, or higher .* --step=1 writes"
    with pytest.raises(ValueError, match=says):
        go(1, **linear)
    assert before == {path: path.read_bytes() for path in before}
    capfd.readouterr()
    assert go(2, **linear).step == 2
    assert "all 2 steps are finished: to go on, set train.steps higher" in capfd.readouterr().err
    assert not caplog.records or "ends there now" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert go(4, **linear).step == 4
    assert "train.steps was 2 and is 4: optim.schedule 'linear:0.1' ends there now" in caplog.text
    assert (tmp_path / "DONE").read_text() == "4\n" and read_config(tmp_path).train.steps == 4
    assert [json.loads(line)["step"] for line in (tmp_path / "seedlog.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
