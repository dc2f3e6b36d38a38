"""Times of programs, measured by a thread beside the loop, traces, and where compiled programs are kept."""

import dataclasses
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.lab import get_config
from es_jax.core.chips import Chip
from es_jax.models.config import TransformerConfig
from es_jax.models.transformer import matrix_weights
from es_jax.profiling import trace, utilisation
from es_jax.profiling.clock import Clock, host, split, timed
from es_jax.profiling.trace import Profile
from es_jax.rundir.directory import compilation_cache
from es_jax.rundir.metrics import read_jsonl
from es_jax.training.config_groups import TrainConfig
from es_jax.training.loop import run


class Running:
    """The output of a program that ends when it is message to."""

    nbytes = 1

    def __init__(self):
        self.ended = threading.Event()


def test_programs_are_timed_in_launch_order_without_waiting_for_them(monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", lambda output: output.ended.wait(20))
    with Clock() as clock:
        first, second = (timed(name, Running()) for name in ("first", "second"))  # the host goes on at once
        with host("grade"):
            time.sleep(0.05)
        second.ended.set()  # what was launched later is behind what was launched before
        time.sleep(0.25)
        first.ended.set()
        seconds = clock.seconds()
        assert seconds["first"] >= 0.3 and seconds["second"] < 0.1 and seconds["grade"] >= 0.05
        clock.restart()
        assert clock.seconds() == {}


def test_without_a_clock_nothing_is_watched():
    threads = threading.active_count()
    assert timed("x", {"a": jnp.ones(3)})["a"].shape == (3,)
    assert threading.active_count() <= threads


def test_a_program_that_fails_does_not_stop_the_clock(monkeypatch):
    def fail(output):
        if output.ended.is_set():
            raise RuntimeError("on purpose")

    monkeypatch.setattr(jax, "block_until_ready", fail)
    with Clock() as clock:
        bad = Running()
        bad.ended.set()
        timed("bad", bad)
        timed("good", Running())
        assert set(clock.seconds()) == {"bad", "good"}


def test_the_parts_of_a_step_add_up():
    columns = split({"perturb": 1.0, "decode": 6.0, "update": 2.0, "grade": 3.0}, total=10.0)
    parts = ("perturb", "decode", "update", "wait")
    assert sum(columns[f"seconds_{name}"] for name in parts) == 10.0
    assert sum(columns[f"share_{name}"] for name in parts) == pytest.approx(1)
    assert columns["seconds_wait"] == 1.0 and columns["share_grade"] == 0.3


def test_utilisation_is_of_the_published_peak_and_unknown_on_a_cpu(monkeypatch):
    model = TransformerConfig(
        family="llama", vocab_size=10, width=4, layers=2, heads=1, kv_heads=1, head_dim=4, mlp_dim=8,
        tied_embeddings=False,
    )  # fmt: skip
    assert matrix_weights(model) == (320, 40)
    assert matrix_weights(dataclasses.replace(model, tied_embeddings=True))[0] == 320
    step = dict(prefill=1000, new=900, completions=100, models=4, seconds=2.0, itemsize=2, slots=8, devices=4)
    assert utilisation.utilisation(model, **step) == {"flop_utilisation": None, "bandwidth_utilisation": None}
    chip = Chip("x", "x", flops=1e6, bandwidth=1e5, memory=1, interconnect=1.0)
    monkeypatch.setattr(utilisation, "find_chip", lambda kind: chip)
    result = utilisation.utilisation(model, **step)
    assert result["flop_utilisation"] == pytest.approx(2 * (320 * 1800 + 40 * 900) / (2 * 4 * 1e6))
    assert result["bandwidth_utilisation"] == pytest.approx(360 * 2 * (4 + 100) / (2 * 4 * 1e5))


@pytest.mark.parametrize("steps", [(3,), (3, 3), (0, 2), (5, 3)])
def test_a_trace_needs_a_first_step_and_a_later_one(steps):
    with pytest.raises(ValueError, match=r"train\.profile"):
        TrainConfig(profile=steps)


def test_a_trace_begins_before_the_last_step():
    with pytest.raises(ValueError, match=r"train\.profile .* train\.steps = 3"):
        TrainConfig(steps=3, profile=(4, 5))


@pytest.mark.parametrize(("stop", "last"), [(4, 5), (9, 3)])
def test_a_trace_is_written_of_the_steps_asked_for(stop, last, tmp_path):
    profile = Profile((2, stop), tmp_path, last=last)
    for step in range(1, last + 1):
        with profile.step(step):
            (jnp.ones(4) * step).block_until_ready()
        message = profile.done(step, {"seconds": 1.0, "prompt_tokens": 5, "tokens": 2, "seconds_grade": 0.1}, dict)
        assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 3)
        assert message == ("the trace of steps 2 to 3 names none of the run's programs" if step == 3 else None)
    profile.close()


def test_a_trace_tells_prefill_apart_from_decode(tmp_path, monkeypatch):
    events = {}  # tokens a completion → part → how many operations the trace books under it
    for max_new_tokens in (1, 24):
        workdir, config = tmp_path / str(max_new_tokens), get_config("steps=3,population=2")
        config.evals.every, config.train.profile, config.mesh.groups = 0, (2, 4), 1
        config.decode.max_new_tokens, config.task.prompts_per_step = max_new_tokens, 60
        run(config, workdir)
        result, rows = json.loads((workdir / "profile.json").read_text()), read_jsonl(workdir / "metrics.jsonl")[1:]
        assert (result["first"], result["last"]) == (2, 3)
        for name in ("seconds", "tokens", "prompt_tokens", "seconds_grade"):
            assert result[name] == pytest.approx(np.mean([row[name] for row in rows]))
        parts = {part: result[f"seconds_{part}"] for part in ("perturb", "prefill", "decode", "update", "wait")}
        assert sum(parts.values()) == pytest.approx(result["seconds"])
        assert min(parts[part] for part in ("perturb", "prefill", "update")) > 0
        assert result["seconds_estimate"] > 0
        assert result["prefill_tokens_per_second"] == pytest.approx(result["prompt_tokens"] / parts["prefill"])
        with monkeypatch.context() as context:
            context.setattr(trace, "_covered", len)  # seconds depend on what else the machine does
            events[max_new_tokens] = trace.part_seconds(workdir / "tb")
    few, many = events[1], events[24]
    assert many["decode"] > 2 * few["decode"] and many["prefill"] < 1.5 * few["prefill"]


def test_the_cache_is_the_runs_own_and_gone_after_it(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        with compilation_cache(tmp_path / "cache"):
            jax.jit(lambda x: x * 3 + 1)(jnp.ones(5)).block_until_ready()
        kept = {path.name for path in (tmp_path / "cache").iterdir()}
        assert kept
        (tmp_path / "cache").rename(tmp_path / "moved")
        with compilation_cache(tmp_path / "moved"):
            jax.jit(lambda x: x * 3 + 1)(jnp.ones(5)).block_until_ready()
        assert {path.name for path in (tmp_path / "moved").iterdir() if not path.name.endswith("-atime")} <= kept
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "users"))
        with compilation_cache(tmp_path / "other"):
            assert jax.config.jax_compilation_cache_dir is None
        assert not (tmp_path / "other").exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
