"""A tokenizer's files, as transformers 4 and 5 read them alike."""

import json
from pathlib import Path
from typing import Any

FILE = "tokenizer_config.json"
_OF_THE_SESSION = ("is_local", "local_files_only", "backend")  # what transformers 5 notes of how it read the tokenizer
_SIDES = ("padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write what `AutoTokenizer` reads: text and ids are then those of this tokenizer in both versions.

    transformers 5 names classes that 4 does not have, and builds some of its own anew where 4 reads tokenizer.json; so
    the class is the one that both take from tokenizer.json as it is, with what the tokenizer's own class says beside
    it. It writes special tokens under a name that is of a dict in transformers 4; the older name is read by both.
    """
    tokenizer.save_pretrained(str(folder))
    path = folder / FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    if (folder / "tokenizer.json").exists():
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        fields |= {name: getattr(tokenizer, name) for name in _SIDES}
    for name in _OF_THE_SESSION:
        fields.pop(name, None)
    named = fields.pop("model_specific_special_tokens", {})
    extra = fields.pop("extra_special_tokens", [])
    if isinstance(extra, dict):
        named, extra = {**extra, **named}, []
    if extra:
        fields["additional_special_tokens"] = extra
    if named:
        fields["extra_special_tokens"] = named
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
