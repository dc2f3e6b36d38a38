"""python -m es_jax.sample --workdir=RUN [--step=S] [--prompt=TEXT …] [--base] [--system=TEXT] [--json]

What a step of a run writes: any step, with a checkpoint or without, the last by default, --step=best of a run with
train.keep_best; or a model folder, .gguf file or hub name. --prompt may be given several times. Without it, prompts
come from the standard input: one a line of a file or a pipe; a chat of several turns in a terminal, until an empty line
or Ctrl-D. With --base the base model, step 0, answers beside it. A prompt is a user's message for the chat template;
with --plain, or where the tokenizer has no template, it is plain text, which the model continues, and each line of a
terminal is a prompt of its own.

Where the output is a terminal, control characters are written as escapes, such as \\x1b. With --json one line is
printed; step is null of a model, and base is there with --base:

    workdir, step, samples ([{prompt, completion, base}])
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from es_jax.core.flags import command, define_processes, parser

# All but tab and newline; and what turns the direction of the text that follows.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Opening = list[dict[str, str]]  # the messages before the first prompt


def main(argv: list[str]) -> None:
    """Flags → complete()."""
    with command("es_jax.sample", argv) as values:
        from es_jax.core import processes
        from es_jax.rundir.directory import compilation_cache
        from es_jax.rundir.places import is_run

        interactive = not values.prompt and sys.stdin.isatty()
        workdir, step = named_step(values.workdir, values.step)
        if interactive and values.json:
            raise ValueError("--json needs prompts: give --prompt, or a file of prompts on the standard input")
        texts = None if interactive else values.prompt or read_lines(sys.stdin)
        run = Path(workdir)
        cache = compilation_cache(run / "cache") if is_run(run) else contextlib.nullcontext()
        with cache:
            number, models = open_models(workdir, step, base=values.base)
            opening = opening_of(models, values.system, plain=values.plain)
            options = {name: values[name].value for name in ("max_new_tokens", "temperature", "seed")}
            if texts is None:
                with contextlib.suppress(KeyboardInterrupt):
                    print("an empty line ends it", file=sys.stderr)
                    chat(models, opening, ask=_ask, say=_say, **options)
                return
            samples = answers(models, opening, texts, **options)
        if not processes.first():
            return
        if values.json:
            print(json.dumps({"workdir": values.workdir, "step": number, "samples": samples}))
        elif len(texts) == len(models) == 1:
            _say(samples[0]["completion"])
        else:
            names = {"prompt": "prompt", **dict(zip(("completion", "base"), models, strict=False))}
            for sample in samples:
                _say("".join(f"{names[field]}: {text}\n" for field, text in sample.items()))


def read_lines(lines: Iterable[str]) -> list[str]:
    """The prompts of a file, one a line; empty lines may only end it. Raises ValueError where there is none."""
    texts = "".join(lines).rstrip("\n").split("\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(
                f"line {number} of the standard input is empty: give a prompt a line, or --prompt, which may hold lines"
            )
    return texts


def named_step(workdir: str, step: str) -> tuple[str, str]:
    """The run and the step that are meant, where `workdir` may be RUN@STEP. Raises ValueError where both name a step,
    FileNotFoundError where there is no such run."""
    from es_jax.rundir.places import run_and_step

    run, number = run_and_step(workdir)
    if number is None:
        return str(run), step
    if step != "last":
        raise ValueError(f"--workdir is {workdir!r} and --step is {step!r}: give one step")
    return str(run), str(number)


def open_models(workdir: str, step: str, *, base: bool) -> tuple[int | None, dict[str, Any]]:
    """The step, and the models that answer, by what they are called. Raises ValueError or OSError where there is
    neither a run nor a model, or not that step."""
    from es_jax.evals.load_step import load_step
    from es_jax.rundir.best import BEST, step_of
    from es_jax.rundir.places import is_run
    from es_jax.rundir.seed_log import steps_done
    from es_jax.training.config import RunConfig
    from es_jax.training.state import compute_dtype
    from es_jax.weights.model import load_model

    if not (step in ("last", BEST) or step.isdecimal()):
        raise ValueError(f"--step is {step!r}: give a whole number from 0, last or best")
    if not is_run(Path(workdir)):
        for flag, given in {"--step": step != "last", "--base": base}.items():
            if given:
                raise ValueError(f"{flag} is for a run, and {workdir} has no config.json of one: leave it out")
        try:
            return None, {"model": load_model(workdir, dtype=compute_dtype(RunConfig()))}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--workdir is {workdir!r}, no run's directory and no model: {error}") from None
    number = steps_done(Path(workdir)) if step == "last" else step_of(workdir, step, flag="--step")
    if base and number == 0:
        raise ValueError("step 0 is the base model: leave --base out, or choose a later --step")
    models = {f"step {number}": load_step(workdir, number)}
    return number, models | ({"base": load_step(workdir, 0)} if base else {})


def opening_of(models: Mapping[str, Any], system: str | None, *, plain: bool) -> Opening | None:
    """The messages before the first prompt; None where prompts are plain text."""
    templates = all(model.tokenizer.chat_template for model in models.values())
    if templates and not plain:
        return [] if system is None else [{"role": "system", "content": system}]
    if system is not None:
        why = "--plain is set" if plain else "this tokenizer has no chat template"
        raise ValueError(f"--system is {system!r}, but {why}: put it into the prompt")
    return None


def answers(
    models: Mapping[str, Any], opening: Opening | None, texts: Sequence[str], **options: Any
) -> list[dict[str, str]]:
    """{"prompt", "completion", "base"} of each prompt; "base" where a second model answers. Options: of `complete`."""
    from es_jax.scoring.text import complete

    prompts = [text if opening is None else [*opening, _message("user", text)] for text in texts]
    columns = [complete(model, prompts, **options) for model in models.values()]
    names = ("prompt", "completion", "base")[: 1 + len(columns)]
    return [dict(zip(names, row, strict=True)) for row in zip(texts, *columns, strict=True)]


def chat(
    models: Mapping[str, Any],
    opening: Opening | None,
    *,
    ask: Callable[[], str],
    say: Callable[[str], None],
    **options: Any,
) -> None:
    """Turns of a user and each model, which sees its own answers, until the user says nothing."""
    from es_jax.scoring.text import complete

    turns: dict[str, Opening] = {name: list(opening or ()) for name in models}
    while text := ask().strip():
        for name, model in models.items():
            turns[name].append(_message("user", text))
            answer = complete(model, text if opening is None else turns[name], **options)
            turns[name].append(_message("assistant", answer))
            say(answer if len(models) == 1 else f"{name}: {answer}")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _ask() -> str:
    """A line of the terminal; nothing at its end."""
    try:
        return input("> ")
    except EOFError:
        return ""


def _say(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text, flush=True)


def printable(text: str) -> str:
    """The text with control characters as escapes, so that a terminal shows what a model wrote and does nothing else.

    >>> printable("red\\x1b[31m")
    'red\\\\x1b[31m'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def entry() -> None:
    flags.DEFINE_string(
        "workdir", None, "A run's directory, or RUN@STEP; or a model folder, .gguf file or hub name.", required=True
    )
    flags.DEFINE_string("step", "last", "Of a run: 0, the base model, to the last; or best.")
    flags.DEFINE_multi_string("prompt", None, "A prompt")  # absl adds that it may be repeated
    flags.DEFINE_bool("base", False, "Of a run: the base model answers, too.")
    flags.DEFINE_string("system", None, "A system message before the prompts.")
    flags.DEFINE_bool("plain", False, "Prompts are plain text, without the chat template.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; above 0 tokens are drawn.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", None, "Tokens after which a completion is cut; 256 by default.")
    define_processes()
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show where an error came from.")
    app.run(main, flags_parser=parser("es_jax.sample"))


if __name__ == "__main__":
    entry()
