"""How the commands read their flags."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags


def parser(command: str, *, required: tuple[str, ...] = ()) -> Callable[[list[str]], list[str]]:
    """absl's parser for a command with a --config file, with a mistake in the file or its arguments told in a sentence.

    Args:
      command: what the sentence begins with, "es_jax.train".
      required: flags that must be given, which a config file cannot say of itself.
    """

    def parse(argv: list[str]) -> list[str]:
        flags.mark_flags_as_required(required)
        for argument in argv:
            if argument.startswith("--config="):  # a config file imports its neighbours: configs.common
                file = argument.removeprefix("--config=").partition(":")[0]
                sys.path.append(str(Path(file).resolve().parent.parent))
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(f"{command}: {str(error).splitlines()[-1].strip() or error}")
        except (AttributeError, ImportError, KeyError, SyntaxError, TypeError, ValueError) as error:
            sys.exit(f"{command}: --config: {error}")

    return parse
