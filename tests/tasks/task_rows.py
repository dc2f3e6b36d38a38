"""Rows of our own in the fields of each published data set, as files in a folder."""

import json
from pathlib import Path
from typing import Any


def _arc(i: int) -> dict[str, Any]:
    options = ["a stone", "a cloud", "a leaf"]
    return {
        "question_id": f"q{i}", "question": f"What sinks in lake {i}?", "options": options,
        "option_labels": ["A", "B", "C"], "answer": "A",
    }  # fmt: skip


def _mmlu_pro(i: int) -> dict[str, Any]:
    return {
        "question_id": i, "question": f"What is {i} + 1?", "options": [str(i + 1), str(i), "N/A"], "answer": "A",
        "answer_index": 0, "cot_content": f"A: One more than {i}. The answer is (A).",
        "category": "math" if i % 2 else "law",
    }  # fmt: skip


ROWS = {  # task: its i-th row
    "gsm8k": lambda i: {"question": f"Two and {i}?", "answer": f"2 + {i} = {2 + i}\n#### {2 + i}"},
    "proofwriter": lambda i: {
        "id": f"T-{i // 2}", "theory": "Anne is kind.", "question": f"Anne{i} is kind.", "answer": "Unknown",
    },
    "hellaswag": lambda i: {
        "activity_label": "Making tea", "ctx": f"[header] A man {i} boils water. [step] He",
        "endings": ["pours it.", "eats it.", "paints it.", "[title] sells it."], "label": "0",
    },
    "piqa": lambda i: {"goal": f"fix cup {i}", "sol1": "with soap", "sol2": "with glue", "label": "2"},
    "arc-challenge": _arc,
    "mmlu-pro": _mmlu_pro,
}  # fmt: skip


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Writes a split as jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(folder: Path, task: str, count: int = 12) -> Path:
    """A folder with train, validation and test rows of a task, all different."""
    for at, split in enumerate(("train", "validation", "test")):
        write(folder, split, [ROWS[task](i) for i in range(at * count, (at + 1) * count)])
    return folder
