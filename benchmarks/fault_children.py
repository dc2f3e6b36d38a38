"""The work of the child processes of benchmarks.faults.

They are forked from a server that has imported this module, and with it es_jax, but has started nothing.
"""

import contextlib
import dataclasses
import hashlib
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.fault_inputs import hostile_completion
from configs.lab import get_config
from es_jax.core.mesh import make_mesh
from es_jax.evals.export_step import export_run
from es_jax.evals.weight_source import of_run
from es_jax.models.config import TransformerConfig
from es_jax.rundir.checkpoints import Checkpoints
from es_jax.tasks import get_task
from es_jax.tasks.conciseness import Conciseness
from es_jax.tasks.lab import Lab
from es_jax.tasks.task import GRADERS, Score
from es_jax.training import loop
from es_jax.training.config import RunConfig, freeze
from es_jax.training.weights_at import weights_at
from es_jax.weights.gguf_tokenizer import PRE_TOKENIZERS
from es_jax.weights.model import load_model
from es_jax.weights.tokenizer import encode_prompt
from tests.helpers import config_of, tiny_model
from tests.tasks.task_rows import ROWS, write, write_rows
from tests.weights import gguf_models

STEPS, MEMORY, SLOW = 4, 4 << 30, 0.010  # steps of the small runs; bytes beyond those of a warm child; seconds
QUESTION = ({"role": "user", "content": "What is 2 + 2? Ünïcode, 12345."},)
Outcome = tuple[str, Any]  # ("value", result), ("refused", sentence) or ("otherwise", type of the error)


def attempt(call: Callable[[], Any], names: Sequence[str]) -> Outcome:
    """The outcome. A refusal is an error of ours whose sentence contains one of the names."""
    try:
        return "value", call()
    except (ValueError, OSError) as error:
        ours = type(error).__module__ == "builtins" and any(name in str(error) for name in names)
        return ("refused", str(error)) if ours else ("otherwise", type(error).__name__)
    except BaseException as error:
        return "otherwise", type(error).__name__


def serve(connection: Connection) -> None:
    """Answers requests (name of an operation, its arguments, names) until there are none."""
    _quiet()
    while True:
        name, arguments, names = connection.recv()
        connection.send(attempt(lambda: OPERATIONS[name](*arguments), names))  # noqa: B023 - it is called at once


def _quiet() -> None:
    """Discard the output of libraries, including what they print of an input."""
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)


def digest(tree: Any) -> str:
    leaves = (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
    return hashlib.sha256(b"".join(leaves)).hexdigest()


# Reading what may be damaged


def prepare(folder: str) -> None:
    """Intact models, rows and runs."""
    root = Path(folder)
    tiny_model(root / "summed")
    shutil.copytree(root / "summed", root / "model")
    (root / "model/SHA256SUMS").unlink()
    _gguf(root / "model.gguf")
    task = Conciseness()
    for split, examples in (("train", task.train(6)), ("test", task.test(4))):
        rows = [{"prompt": list(e.prompt), "reward_model": {"ground_truth": e.answer}, "id": e.id} for e in examples]
        write(root / "rows", split, rows)
        _parquet(root / "parquet", split, rows)
    for name in RUNS:
        loop.run(small_config(root, name), root / name)


RUNS = {"run": ("model", "rows"), "gguf_run": ("model.gguf", None), "parquet_run": ("model", "parquet")}


def small_config(root: Path, name: str) -> RunConfig:
    model, rows = RUNS[name]
    task = {"train_size": 4} | ({"data_dir": str(root / rows)} if rows else {})
    train = {"steps": STEPS, "checkpoint_every": 3}
    return config_of(root / model, task=task, train=train, evals={"every": STEPS})


def _gguf(path: Path) -> None:
    words = gguf_models.byte_level_metadata(
        gguf_models.reference_tokenizer(PRE_TOKENIZERS["qwen2"].pattern or "", nfc=True, ignore_merges=False),
        pre="qwen2",
    )
    words["tokenizer.chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = TransformerConfig(
        family="qwen2", vocab_size=400, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, qkv_bias=True
    )
    gguf_models.write_gguf(path, config, gguf_models.random_params(config), words, kind="Q8_0")


def _parquet(folder: Path, split: str, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")


def read_model(source: str) -> list:
    """A model of which only the files are known."""
    model = load_model(source)
    ids = encode_prompt(model.tokenizer, QUESTION)
    text = model.tokenizer.decode(ids + list(range(0, 250, 7)))
    return [digest(model.params), repr(model.config), ids, text, model.stop_token_ids]


def read_run(workdir: str) -> list:
    """The base model of a run, read as by evaluation and export."""
    source = of_run(Path(workdir), make_mesh(1))
    ((_, params),) = source.weights([0])
    model = source.model
    return [digest(params), repr(model.config), encode_prompt(model.tokenizer, QUESTION), model.stop_token_ids]


def replay_run(workdir: str) -> str:
    """The last step, from the seed log."""
    ((_, params),) = weights_at(workdir, [STEPS], checkpoints=False)
    return digest(params)


def restore_run(workdir: str) -> str:
    """The last step, from its checkpoint."""
    ((_, params),) = weights_at(workdir, [STEPS])
    return digest(params)


def resume_run(root: str, name: str, workdir: str) -> list:
    """A finished run that is started again and does nothing."""
    result = loop.run(small_config(Path(root), name), workdir)
    return [digest(result.params), result.step, (Path(workdir) / "evals/conciseness.jsonl").read_text()]


def limit_memory() -> None:
    """Limit a child to MEMORY bytes beyond its current memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# Grading


def grade(folder: str, task: str, grader: str | None, seed: int, trials: int) -> tuple[int, int]:
    """How many hostile completions end in an error, and how many take too long."""
    options: dict[str, Any] = {} if grader is None else {"grader": grader}
    if task in ROWS:
        options["data_dir"] = write_rows(Path(folder) / task, task)
    graded = get_task(task, **options)
    examples, draw = graded.test(4), random.Random(seed)
    failed = slow = 0
    for trial in range(trials):
        example, text = examples[trial % 4], hostile_completion(draw)
        try:
            score = graded.score(example, text)
            failed += not np.isfinite(score.reward)
            slow += min(_seconds(lambda: graded.score(example, text)) for _ in range(2)) > SLOW  # noqa: B023
        except Exception:
            failed += 1
    return failed, slow


def _seconds(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def graders_of(task: str) -> tuple[str | None, ...]:
    names = {field.name for field in dataclasses.fields(get_task(task))}  # type: ignore[arg-type]
    return GRADERS if "grader" in names else (None,)


# Training with a fault


def lab_config() -> RunConfig:
    """A short run of the laboratory."""
    config = get_config("anchor=l2,population=4,steps=8")
    config.task.prompts_per_step, config.task.train_size = 16, 64
    config.train.checkpoint_every, config.train.keep_checkpoints = 2, 2
    config.evals.every, config.evals.rows, config.evals.tasks = 4, 8, ("lab-add",)
    return freeze(config)


def train_and_tell(connection: Connection, workdir: str) -> None:
    """`train`, in a separate process that reports when it begins to save."""
    _quiet()
    save = Checkpoints.save

    def saving(*args: Any) -> None:
        connection.send("saving")
        save(*args)

    Checkpoints.save = saving  # type: ignore[method-assign]
    connection.send("began")
    train(workdir)


def train(workdir: str) -> str:
    """A run of the laboratory."""
    return digest(loop.run(lab_config(), workdir).params)


def train_on_a_full_disk(workdir: str, limit: int) -> str:
    """Limit the size of files to so many bytes."""
    with _files_limited_to(limit):
        return train(workdir)


def export_to_a_full_disk(workdir: str, out: str, limit: int) -> str:
    with _files_limited_to(limit):
        export_run(workdir, out)
    return digest(load_model(out).params)


@contextlib.contextmanager
def _files_limited_to(limit: int) -> Iterator[None]:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # the cache is only read, and so not truncated
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def train_with_nan(workdir: str, call: int) -> str:
    """Make the reward of the completion with that number NaN."""
    calls = [0]

    @dataclasses.dataclass(frozen=True)
    class Broken(Lab):
        def score(self, example: Any, completion: str) -> Score:
            calls[0] += 1
            score = super().score(example, completion)
            return dataclasses.replace(score, reward=float("nan")) if calls[0] == call else score

    make = loop.make_task
    loop.make_task = lambda config: Broken("countdown")
    try:
        return train(workdir)
    finally:
        loop.make_task = make


def leftovers(workdir: str) -> list[str]:
    """What should not be in a run's directory: partial files and folders that a kill left."""
    root = Path(workdir)
    names = [path.name for path in (root / "ckpt").iterdir() if not path.name.isdigit()]
    return names + [path.name for path in root.rglob("*.tmp")]


OPERATIONS: dict[str, Callable[..., Any]] = {
    call.__name__: call
    for call in (
        *(prepare, read_model, read_run, replay_run, restore_run, resume_run, limit_memory, grade),
        *(train, train_on_a_full_disk, export_to_a_full_disk, train_with_nan),
    )
}
