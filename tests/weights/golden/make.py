"""Write sentencepiece.json: two small SentencePiece models and the ids that the library itself gives, to compare with.

Command:  python -m tests.weights.golden.make
Needs:    pip install sentencepiece==0.2.3, which nothing else in the project needs

One model is as Llama 2's and Mistral's (a dummy space before the text, digits apart), one as Gemma's (no dummy space,
runs of line ends and blanks as user-defined pieces). Both are BPE with bytes to fall back on. What is stored is what a
GGUF file holds of them: pieces, scores, types; and for each text its ids.
"""

import json
import tempfile
from pathlib import Path

FILE = Path(__file__).with_name("sentencepiece.json")
CORPUS = (
    "The keeper's notebook said that on 31 October 2024 the tide would not come, and it did.",
    "She had counted 1234567 waves; they will count more. Naïve façade, 你好世界, Ωmega.",
    "the other keeper counted the other waves and then the other tide came to the harbour",
    "def f(x):    return x**2 + 10_000  # DON'T shout! I'M here, we've been there.",
    "In the harbour there was a notebook, and in the notebook there was a number.",
)
TEXTS = (
    *CORPUS,
    "",
    " ",
    " one blank before",
    "   three before, one behind ",
    "the  two   three    four     blanks",
    "a\nb\n\nc\n\n\nd\t\te\r\n",
    "  \n  \n",
    "naïve 你好 🙂👍🏽 漢字 ①½",
    "<0x41> is text",
    "3.14159 costs 1,000,000",
    "thethethe keeperkeeper",
)
MODELS = {
    "llama": {"vocab_size": 460, "split_digits": True, "add_dummy_prefix": True},
    "gemma": {
        **{"vocab_size": 480, "split_digits": True, "add_dummy_prefix": False},
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>"},
        **{"bos_piece": "<bos>", "eos_piece": "<eos>", "control_symbols": ["<start_of_turn>", "<end_of_turn>"]},
        "user_defined_symbols": ["\n", "\n\n", "\n\n\n", "\t\t", "▁▁", "▁▁▁", "▁▁▁▁", "<h1>"],
    },
}


def train(folder: Path, options: dict) -> dict:
    """A model trained on CORPUS, as a GGUF file would hold it, and the ids of TEXTS."""
    import sentencepiece as spm
    from sentencepiece import sentencepiece_model_pb2 as pb2

    (folder / "corpus.txt").write_text("\n".join(CORPUS * 4), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "m"), model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
        allow_whitespace_only_pieces=True, minloglevel=2, **options,
    )  # fmt: skip
    model, processor = pb2.ModelProto(), spm.SentencePieceProcessor(model_file=str(folder / "m.model"))
    model.ParseFromString((folder / "m.model").read_bytes())
    pieces = [(p.piece.replace("▁", " ") if p.type == 4 else p.piece, p.score, p.type) for p in model.pieces]
    return {
        "add_space_prefix": options["add_dummy_prefix"],
        "ids": {name: getattr(processor, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")},
        "tokens": [piece for piece, _, _ in pieces],
        "scores": [score for _, score, _ in pieces],
        "types": [kind for _, _, kind in pieces],
        "texts": {text: processor.encode(text) for text in TEXTS},
    }


def main() -> None:
    """Train, encode and write; two runs give the same file."""
    found = {}
    for name, options in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = train(Path(folder), options)
    FILE.write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
