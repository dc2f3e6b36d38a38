"""The tasks of evals.tasks, and where their rows come from."""

import json
from pathlib import Path

import pytest

from es_jax.tasks import TASKS
from es_jax.training.config import freeze
from es_jax.training.loop import other_task, run

ROW = {"goal": "mend a cup", "sol1": "with soap", "sol2": "with glue", "label": "2"}


def test_rows_come_from_evals_data_dir(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text(json.dumps(ROW))
    config = freeze({"evals": {"data_dir": str(tmp_path), "tasks": ["piqa", "lab-add", "arc-challenge"]}})
    (example,) = other_task(config, "piqa").test()
    assert "mend a cup" in example.prompt[0]["content"] and example.answer == "2"
    assert len(other_task(config, "lab-add").test(3)) == 3
    with pytest.raises(
        FileNotFoundError, match="no folder arc-challenge or arc_challenge for task 'arc-challenge'; it"
    ):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith(("lab-", "json-"))])
def test_every_other_task_takes_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    task = other_task(freeze({"evals": {"data_dir": str(tmp_path)}}), name)
    with pytest.raises(FileNotFoundError, match=r"has no 'test' split: .* it holds nothing"):
        task.test(1)
