"""es_jax COMMAND [FLAGS]: the commands of es_jax by one name; `python -m es_jax` is the same.

Each command is also a module with the same flags: `python -m es_jax.train`. `es_jax COMMAND --help` lists the flags.
"""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

from es_jax.core.extras import require

COMMANDS = {  # name → the function that runs it, and what it does; a missing module is left out
    "train": ("es_jax.train:entry", "train a run, or resume the one in a directory"),
    "evaluate": ("es_jax.evaluate:entry", "measure accuracy, KL and drift of any step of a run, or of a model"),
    "sample": ("es_jax.sample:entry", "let a step of a run, or a model, write"),
    "export": ("es_jax.export:entry", "write a step of a run as a Hugging Face folder"),
    "report": ("es_jax.report:main", "make one page of figures and tables about some runs"),
    "plan": ("es_jax.plan:entry", "find out whether a run fits devices that you do not have"),
    "sweep": ("es_jax.sweep:entry", "run every point of a grid of fields"),
}


def names() -> list[str]:
    """The commands whose modules exist."""
    return [name for name, (target, _) in COMMANDS.items() if importlib.util.find_spec(target.partition(":")[0])]


def usage() -> str:
    """The text of --help."""
    rows = "\n".join(f"  {name:10}{COMMANDS[name][1]}" for name in names())
    return f"{(__doc__ or '').strip()}\n\n{rows}\n\n  --version  the version of es_jax\n  --help     this text"


def main() -> None:
    """Runs the command that the first argument names, with the other arguments."""
    command, *arguments = sys.argv[1:] or [""]
    if command in ("--help", "-h", "-help", "help", "--helpfull", "--helpshort"):
        print(usage())
    elif command == "--version":
        print("es_jax", sys.modules["es_jax"].__version__)
    elif command in names():
        sys.argv = [f"es_jax {command}", *arguments]
        _run(command)
    else:
        from es_jax.core.names import unknown

        wrong = f"es_jax: {unknown('command', command, names())}; es_jax COMMAND --help lists its flags"
        print(wrong if command else usage(), file=sys.stderr)
        sys.exit(2)


def _run(command: str) -> None:
    module, _, function = COMMANDS[command][0].partition(":")
    try:
        require("llm")
        entry = getattr(importlib.import_module(module), function)
    except ImportError as error:
        if not {"--help", "-h"} & set(sys.argv):
            sys.exit(f"{module}: {error}")
        source = importlib.util.find_spec(module).origin  # type: ignore[union-attr]
        print(f"{ast.get_docstring(ast.parse(Path(str(source)).read_text()))}\n\n{error}")
    else:
        entry()


if __name__ == "__main__":
    main()
