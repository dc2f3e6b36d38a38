"""python -m es_jax.sample --workdir=RUN [--step=S] [--prompt=TEXT …] [--base] [--system=TEXT] [--json]

Shows what a step of a run writes. Any step works, with or without a checkpoint; the last is the default, and
--step=best needs a run with train.keep_best. --workdir may also be a model folder, .gguf file or hub name. --prompt may
be given several times. Without it, prompts come from standard input: one per line of a file or a pipe, or in a terminal
a chat of several turns, until an empty line or Ctrl-D. With --base the base model, step 0, answers too. A prompt is a
user message for the chat template. With --plain, or if the tokenizer has no template, it is plain text that the model
continues, and each line in a terminal is a separate prompt.

If the output is a terminal, control characters are written as escapes, such as \\x1b. With --json one line is printed;
step is null for a model, and base is included with --base:

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

# All but tab and newline; and the marks that change the direction of the text after them.
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
            raise ValueError("--json needs prompts: give --prompt, or a file of prompts on standard input")
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
    """The prompts of a file, one per line; only trailing lines may be empty. Raises ValueError if there is none."""
    texts = "".join(lines).rstrip("\n").split("\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(
                f"line {number} of standard input is empty: give one prompt per line, or use --prompt, which may hold "
                "several lines"
            )
    return texts


def named_step(workdir: str, step: str) -> tuple[str, str]:
    """The run and the step that are meant; `workdir` may be RUN@STEP. Raises ValueError if both name a step,
    FileNotFoundError if there is no such run."""
    from es_jax.rundir.places import run_and_step

    run, number = run_and_step(workdir)
    if number is None:
        return str(run), step
    if step != "last":
        raise ValueError(f"--workdir is {workdir!r} and --step is {step!r}: give the step in one of them only")
    return str(run), str(number)


def open_models(workdir: str, step: str, *, base: bool) -> tuple[int | None, dict[str, Any]]:
    """The step, and the models that answer, by label. Raises ValueError or OSError if there is neither a run nor a
    model, or no such step."""
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
                raise ValueError(f"{flag} needs a run, and {workdir} is not a run's directory: leave {flag} out")
        try:
            return None, {"model": load_model(workdir, dtype=compute_dtype(RunConfig()))}
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"--workdir is {workdir!r}, which is neither a run's directory nor a model: {error}"
            ) from None
    number = steps_done(Path(workdir)) if step == "last" else step_of(workdir, step, flag="--step")
    if base and number == 0:
        raise ValueError("step 0 is the base model: leave --base out, or choose a later --step")
    models = {f"step {number}": load_step(workdir, number)}
    return number, models | ({"base": load_step(workdir, 0)} if base else {})


def opening_of(models: Mapping[str, Any], system: str | None, *, plain: bool) -> Opening | None:
    """The messages before the first prompt; None if prompts are plain text."""
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
    """{"prompt", "completion", "base"} for each prompt; "base" if a second model answers. The options are those of
    `complete`."""
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
    """Alternates between the user and each model, which sees its own answers, until the user enters an empty line."""
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
    """A line from the terminal; "" at the end of input."""
    try:
        return input("> ")
    except EOFError:
        return ""


def _say(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text, flush=True)


def printable(text: str) -> str:
    """The text with control characters as escapes, so that a terminal only shows what a model wrote.

    >>> printable("red\\x1b[31m")
    'red\\\\x1b[31m'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def entry() -> None:
    flags.DEFINE_string(
        "workdir", None, "A run's directory, or RUN@STEP; or a model folder, .gguf file or hub name.", required=True
    )
    flags.DEFINE_string("step", "last", "Step of a run, 0 (the base model) to the last; or best.")
    flags.DEFINE_multi_string("prompt", None, "A prompt")  # absl's help adds that it may be repeated
    flags.DEFINE_bool("base", False, "For a run: let the base model answer too.")
    flags.DEFINE_string("system", None, "A system message before the prompts.")
    flags.DEFINE_bool("plain", False, "Treat prompts as plain text, without the chat template.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; above 0 tokens are sampled.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", None, "The most tokens of a completion; 256 by default.")
    define_processes()
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")
    app.run(main, flags_parser=parser("es_jax.sample"))


if __name__ == "__main__":
    entry()
