"""Worker processes that score completions."""

import multiprocessing
import os
import signal
import time

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
        with pytest.raises(ValueError, match=r"'slow' could not score example '7'.*no such thing"):
            submit(Example("7", "", None), "bad")()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_workers_start_with_the_context():
    before = len(multiprocessing.active_children())
    with workers_of(Slow(workers=2)):
        assert len(multiprocessing.active_children()) == before + 2


def test_the_death_of_a_worker_is_told_with_the_example_that_it_scored():
    with workers_of(Slow()) as submit:
        last, other = submit(Example("1", "", None), "die"), submit(Example("2", "", None), "0.1")
        with pytest.raises(
            ValueError, match=r"'slow' could not score example '1': its worker process ended \(exit code -9\)"
        ):
            last()
        assert other().reward == 2


def test_a_worker_stays_when_the_whole_group_is_told_to_end():
    """The run's own process then saves its last step, which needs the scores."""
    with workers_of(Slow(workers=1)) as submit:
        pid = int(submit(Example("0", "", None), "0")().parts["pid"])
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        assert submit(Example("1", "", None), "0")().parts["pid"] == pid


@pytest.mark.parametrize("own", [True, False])
def test_a_score_that_blocks_is_told_after_its_timeout(own):
    """Whether it sleeps or computes, and whoever else waits; the timeout counts from where its scoring begins."""
    task = Slow(workers=int(own), timeout_seconds=1.0 if own else None)
    began = time.monotonic()
    with workers_of(task, None if own else 1.0) as submit:
        first = [submit(Example(str(i), "", None), "0.6") for i in range(2)]
        blocked, later = submit(Example("9", "", None), "spin"), submit(Example("10", "", None), "0")
        assert [score().reward for score in first] == [0, 1]
        with pytest.raises(ValueError, match=r"example '9': it took longer than task\.timeout_seconds = 1: mend"):
            blocked()
        with pytest.raises(ValueError, match="example '10': its worker process ended"):
            later()
    assert time.monotonic() - began < 20


def test_a_task_that_cannot_travel_is_told_before_anything_starts():
    class Local(Slow):
        pass

    with (
        pytest.raises(ValueError, match=r"'slow' cannot be sent to a worker process .*at the top of a file"),
        workers_of(Local()),
    ):
        pass


@pytest.mark.parametrize("limit", [0, -1.0, "3", float("inf")])
def test_a_wrong_timeout_is_refused(limit):
    with (
        pytest.raises(ValueError, match=rf"has timeout_seconds {limit!r}: set it"),
        workers_of(Slow(timeout_seconds=limit)),
    ):
        pass


@pytest.mark.parametrize("workers", [-1, 2.0, True])
def test_a_wrong_number_of_workers_is_refused(workers):
    with (
        pytest.raises(ValueError, match=rf"has workers {workers}: set it to a whole number"),
        workers_of(Slow(workers=workers)),
    ):
        pass
