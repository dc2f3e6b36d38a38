"""Worker processes that score completions."""

import multiprocessing
import os

import pytest
from slow_task import Slow

from es_jax.scoring.workers import workers_of
from es_jax.tasks import Example


def test_workers_score_in_order_without_jax_and_end_with_the_context():
    with workers_of(Slow()) as submit:
        waiting = [submit(Example(str(i), "", None), str(0.3 - i / 10)) for i in range(4)]
        scores = [score() for score in waiting]
        pids = {int(score.parts["pid"]) for score in scores}
        assert [score.reward for score in scores] == [0, 1, 2, 3]
        assert os.getpid() not in pids
        assert not any(score.parts["jax"] for score in scores)
        with pytest.raises(RuntimeError, match=r"'slow' could not score example '7'.*no such thing"):
            submit(Example("7", "", None), "bad")()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_workers_start_with_the_context():
    before = len(multiprocessing.active_children())
    with workers_of(Slow(workers=2)):
        assert len(multiprocessing.active_children()) == before + 2


def test_the_death_of_a_worker_is_told_with_the_example_by_all_that_wait():
    with workers_of(Slow()) as submit:
        last = submit(Example("1", "", None), "die")
        for wait in (last, lambda: submit(Example("1", "", None), "0")):
            with pytest.raises(RuntimeError, match=r"'slow' could not score example '1'.*BrokenProcessPool"):
                wait()


@pytest.mark.parametrize("workers", [-1, 2.0, True])
def test_a_wrong_number_of_workers_is_refused(workers):
    with (
        pytest.raises(ValueError, match=rf"has workers {workers}: set it to a whole number"),
        workers_of(Slow(workers=workers)),
    ):
        pass
