"""A step of a run as a Hugging Face folder, with a card that says how it came about."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from es_jax.core.tree import count
from es_jax.models.transformer import param_shapes
from es_jax.rundir import directory
from es_jax.rundir.best import step_of
from es_jax.rundir.checkpoints import saved_steps
from es_jax.rundir.metrics import read_jsonl
from es_jax.rundir.places import MODELS, run_and_step
from es_jax.rundir.seed_log import read_entries
from es_jax.tasks.outside import label
from es_jax.training.config import read_config
from es_jax.training.method import METHODS
from es_jax.training.start import outline_of
from es_jax.training.weights_at import weights_at
from es_jax.weights.model import check_new, save_model


def export_run(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> dict[str, Any]:
    """Write the weights of a run's step to a new or empty folder; `save_model` says what is in it.

    Args:
      workdir: a run's directory, or RUN@STEP; nothing in it is changed.
      step: 0 (the base weights) to the last finished one; "best" of a run with train.keep_best; the last by default.
      dtype: of the weights; the run's model.param_dtype by default.

    Returns:
      out, step, source ("checkpoint" or "replay"), parameters, dtype, files and bytes of the weights.

    Raises:
      OSError: no run in the directory, its base model is gone, or `out` is not empty, cannot be made or does not fit.
      ValueError: a step that the log does not hold, one of a GRPO run that has no checkpoint, or a base model that is
        not the run's.
    """
    if step is None:
        workdir, step = run_and_step(workdir)
    workdir, out = Path(workdir), Path(out).expanduser()
    facts, config = directory.read(workdir), read_config(workdir, needs=MODELS)
    last = len(read_entries(workdir))
    step = last if step is None else step_of(workdir, step)
    if not 0 <= step <= last:
        raise ValueError(f"step is {step}, but {workdir} holds steps 0 to {last}")
    check_new(out)
    base = outline_of(workdir)
    wanted = jnp.dtype(config.model.param_dtype if dtype is None else dtype)
    check_new(out, nbytes=wanted.itemsize * sum(map(math.prod, param_shapes(base.config).values())))
    source = "checkpoint" if step in saved_steps(workdir) else "replay"
    ((_, params),) = weights_at(workdir, [step])
    rows = read_jsonl(workdir / "evals" / f"{label(config.task.name)}.jsonl")
    evals = next((row for row in rows if row["step"] == step), None)
    card = _card(facts, step, str(wanted), evals)
    save_model(out, dataclasses.replace(base, params=params), dtype=wanted, max_shard_bytes=max_shard_bytes, card=card)
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    return {
        "out": str(out),
        "step": step,
        "source": source,
        "parameters": count(params),
        "dtype": str(wanted),
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def _card(facts: dict[str, Any], step: int, dtype: str, evals: dict[str, Any] | None) -> str:
    """The text of the folder's README.md, from what a run's config.json holds: YAML, then Markdown."""
    config, parent = facts["config"], facts.get("parent")
    source, run = parent["model"] if parent else config["model"]["source"], config["train"]
    on_hub = source.count("/") == 1 and not Path(source).expanduser().exists()
    hub = f"base_model: {json.dumps(source)}\n" if on_hub else ""
    resumed = f", resumed {len(facts['resumed'])} times" if facts.get("resumed") else ""
    method = METHODS[config.get("method", "es")]
    decoded = "of held-out rows" if config["decode"].get("temperature") else "in training"
    table = {
        "base model": f"`{source}`",
        "sha256 of its weight files": f"`{(parent or facts)['digest']}`",
        **({"started from": f"step {parent['step']} of the run `{parent['run']}`"} if parent else {}),
        "step": f"{step} of {run['steps']}{resumed}",
        "weights": f"{facts.get('parameters', 'unknown')} numbers, written as {dtype}",
        "task": f"`{config['task']['name']}`, seed {config['task']['seed']}",
        "run seed": run["seed"],
        "day in prompts": config["model"].get("template_date") or "not written down",
        "held out": f"`{json.dumps(evals)}`" if evals else "no evaluation at this step",
    }
    return (
        f"---\nlibrary_name: transformers\ntags: [es_jax, {method.tag}]\n{hub}---\n\n"
        f"# Step {step} of a run of es_jax\n\nFine-tuned with {method.title}. "
        "The licence is the base model's.\n\n| | |\n|---|---|\n"
        + "".join(f"| {name} | {value} |\n" for name, value in table.items())
        + f"\nGreedy decoding, as {decoded}: `model.generate(**inputs, do_sample=False, repetition_penalty=1.0)`."
        "\n\n## Config\n\n```json\n"
        + json.dumps({"config": config, "versions": facts.get("versions")}, indent=2)
        + "\n```\n"
    )
