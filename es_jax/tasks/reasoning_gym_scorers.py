"""What we know about the scorers of reasoning-gym VERSION from reading them: which tasks are supported, which form an
answer to some of them must have, and why others are refused. A version that was not read is refused."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

VERSION = "0.1.25"


class Scorer(NamedTuple):
    """A supported scorer.

    Attributes:
      entry: it reads a row's metadata as well as the answer, so rows keep them.
      form: an answer is scored only if this regular expression matches all of it; others get 0.
      longest: an answer longer than the reference gets 0.
      why: what the library's scorer would do without this check.
    """

    entry: bool = False
    form: str | None = None
    longest: bool = False
    why: str = ""


_NUMBER = r"[+-]?[0-9]{1,12}(?:\.[0-9]{0,12})?"
_CLOCK = r"[0-9]{1,4}:[0-9]{1,2}(?::[0-9]{1,2}(?:\.[0-9]{1,6})?)?"

# These look for the reference: full marks for it alone, and a share in proportion to its length if a longer text
# contains it.
_EQUAL = (
    *("acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf", "binary_alternation", "caesar_cipher"),
    *("count_bits", "count_primes", "course_schedule", "gcd", "isomorphic_strings", "largest_island", "lcm"),
    *("leg_counting", "letter_counting", "list_functions", "mahjong_puzzle", "maze", "modulo_grid"),
    *("number_filtering", "number_sequence", "ransom_note", "rotate_matrix", "rotten_oranges", "simple_equations"),
    *("simple_geometry", "string_manipulation", "string_splitting", "string_synthesis", "syllogism"),
    "word_sequence_reversal",
)
# These compare text, numbers, letters or JSON with the reference; no answer makes them raise, hang or misjudge.
_COMPARE = (
    *("ab", "chain_sum", "circuit_logic", "color_cube_rotation", "decimal_arithmetic", "decimal_chain_sum", "dice"),
    *("emoji_mystery", "family_relationships", "knights_knaves", "manipulate_matrix", "needle_haystack", "path_star"),
    *("power_function", "products", "rectangle_count", "self_reference", "sentence_reordering", "tsumego"),
    "zebra_puzzles",
)
# These simulate a solution, or compare grids, with the row's metadata.
_PLAY = (
    *("advanced_geometry", "arc_agi", "cryptarithm", "futoshiki", "graph_color", "group_anagrams", "jugs", "kakurasu"),
    *("mini_sudoku", "number_format", "palindrome_generation", "palindrome_partitioning", "rearc", "shortest_path"),
    *("sokoban", "sudoku", "survo", "tower_of_hanoi", "word_ladder", "word_sorting"),
)
_GUARDED = {
    "complex_arithmetic": Scorer(
        True,
        rf"{_NUMBER}\s*[ij]?|[+-]?[ij]|{_NUMBER}\s*[+-]\s*(?:[0-9]{{1,12}}(?:\.[0-9]{{0,12}})?)?\s*[ij]",
        why="it gives full marks to nan, and raises on huge numbers",
    ),
    "fraction_simplification": Scorer(
        True,
        r"\$?\s*(?:\\d?frac\s*\{\s*[0-9]{1,30}\s*\}\s*\{\s*[0-9]{1,30}\s*\}|[0-9]{1,30}\s*/\s*[0-9]{1,30})\s*\$?",
        why="it takes whatever follows a fraction",
    ),
    "game_of_life": Scorer(False, r"\[[\[\]0-9,\s]*\]", why="it raises on JSON that is not a list"),
    "gsm_symbolic": Scorer(
        False, r"\$?[0-9]{1,15}(?:\.[0-9]{1,15})?", why="it overlooks a minus sign, and reads 1,200 as 1"
    ),
    "letter_jumble": Scorer(longest=True, why="it takes whatever follows the reference"),
    "polynomial_equations": Scorer(
        False,
        rf'(?:""|{_NUMBER}(?:\s*,\s*{_NUMBER}){{0,9}})?',
        why="where no real number solves the equation it gives full marks to prose",
    ),
    "pool_matrix": Scorer(False, r"[0-9.\s-]*[0-9][0-9.\s-]*", why="it gives marks to nan"),
    "prime_factorization": Scorer(False, r"[0-9]{1,12}(?:\s*×\s*[0-9]{1,12}){0,60}", why="it raises on prose"),
    "quantum_lock": Scorer(
        True, r"[ABC](?:[ ,→>-]{0,5}[ABC]){0,200}", why="it presses the buttons a, b and c that words of prose hold"
    ),
    "rush_hour": Scorer(
        True, r"[A-Z][+-][1-9](?:\s+[A-Z][+-][1-9]){0,200}", why="it makes as many moves as a number says"
    ),
    "spell_backward": Scorer(longest=True, why="it gives full marks, or more, to what follows the reference"),
    "time_intervals": Scorer(
        True,
        rf"-?[0-9]{{1,6}}(?: days?)?(?:, {_CLOCK})?|{_CLOCK}",
        why="it raises on long numbers, and takes whatever follows one",
    ),
}
ALLOWED: Mapping[str, Scorer] = MappingProxyType(
    dict.fromkeys((*_EQUAL, *_COMPARE), Scorer()) | dict.fromkeys(_PLAY, Scorer(entry=True)) | _GUARDED
)

_EVALUATES, _SYMBOLIC = (
    "its scorer evaluates the answer as Python",
    "its scorer parses the answer by sympy, as Python",
)
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _EVALUATES),
        **dict.fromkeys(("countdown", "intermediate_integration", "polynomial_multiplication"), _SYMBOLIC),
        **dict.fromkeys(("puzzle24", "simple_integration"), _SYMBOLIC),
        "bitwise_arithmetic": "its scorer evaluates text of the row as Python, and rows are kept in files",
        "boxnet": "its scorer raises on most JSON, and its rows have no reference",
        "calendar_arithmetic": "its scorer has no upper bound where the reference is negative",
        "codeio": "it runs code from its data file, and its rows differ from one making to the next",
        "coin_flip": "its scorer gives full marks to the answer 0 wherever the reference begins with 0",
        "composite": "it mixes other tasks: name these, as evals.tasks",
        "figlet_font": "its scorer gives full marks to ten right letters of a longer word",
        "game_of_life_halting": "its scorer gives full marks to any text",
        "knight_swap": "a row takes seconds to make",
        "number_sorting": "its scorer takes numbers that are off by 1, and may evaluate text of the row as Python",
        "propositional_logic": "its scorer gives full marks to a copied premise, and takes seconds over a long formula",
        "rubiks_cube": "its scorer repeats a move as often as a number says",
    }
)
