"""Writes a tokenizer's files so that transformers 4 and 5 read them alike."""

import json
from pathlib import Path
from typing import Any

FILE = "tokenizer_config.json"
_OF_THE_SESSION = ("is_local", "local_files_only", "backend")  # transformers 5 records here how it read the tokenizer
_SIDES = ("padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files for `AutoTokenizer`; in both versions it then gives the text and ids of this tokenizer.

    transformers 5 names classes that 4 does not have, and rebuilds some of its classes where 4 reads tokenizer.json. So
    the class written here is the one that both versions load from tokenizer.json unchanged, with the settings of the
    tokenizer's own class added. transformers 5 also writes special tokens under a name that holds a dict in
    transformers 4; both read the older name.
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
