"""Which models fit on which chips: runs `python -m es_jax.plan` over topologies and models, for the table in
docs/scale.md.

Command:  python -m benchmarks.scale [--topologies=v5e:4x4,…] [--models=Qwen/Qwen2.5-7B,…] [--slots=100] [--search]
Cost:     see the column "CPU" of the table; TPUs need libtpu, H100s the CUDA plugin (docs/scale.md).
Result:   docs/scale.md.

Every cell runs in its own process. A cell that is already in docs/scale.jsonl is not compiled again; to repeat it,
delete its line or the file. The table in docs/scale.md is rewritten from the file each time.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CELLS, PAGE = ROOT / "docs/scale.jsonl", ROOT / "docs/scale.md"
TOPOLOGIES = ("v5e:4x4", "v6e:4x4", "h100:1x1x8", "v5p:4x4x4", "v5e:16x16")
MODELS = ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B", "meta-llama/Llama-3.1-8B")
POPULATION = {"v5p:4x4x4": 256, "v5e:16x16": 256}  # with 32 members most of so many devices would be idle
BEGIN, END = "<!-- table: benchmarks/scale.py -->\n", "<!-- end of table -->\n"


def command(topology: str, model: str, *, slots: int, memory: str = "device", search: bool = False) -> list[str]:
    """The plan of one cell: 200 prompts of 256 tokens, 1024 new ones, an l2 anchor."""
    population = POPULATION.get(topology, 32)
    return [
        "es_jax.plan",
        f"--config=configs/countdown.py:anchor=l2,population={population}",
        f"--config.model.source={model}",
        "--config.decode.max_prompt_tokens=256",
        f"--config.decode.slots={slots}",
        f"--config.optim.anchor.memory={memory}",
        f"--topology={topology}",
        "--json",
        *(["--search"] if search else []),
    ]


def plan(topology: str, model: str, **options: object) -> dict:
    """The fields that the command prints, or an error if it prints none."""
    arguments = command(topology, model, **options)  # type: ignore[arg-type]
    before = _cpu_seconds()
    process = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    cpu = _cpu_seconds() - before
    printed = process.stdout.strip().splitlines()
    fields = json.loads(printed[-1]) if printed else {"error": process.stderr.strip()[-300:]}
    population = POPULATION.get(topology, 32)
    what = {"model": model, "topology": topology, "population": population, "command": arguments}
    return what | {"cpu_seconds": cpu} | fields


def _cpu_seconds() -> float:
    """CPU seconds of the ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(cells: list[dict]) -> str:
    """Markdown: a row a cell."""
    lines = [
        "| topology | model | N | mesh | slots | evaluation, GiB | update, GiB | sent, GB | bound, s | CPU, s | fits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(cells, key=lambda cell: (TOPOLOGIES.index(cell["topology"]), MODELS.index(cell["model"]))):
        lines.append("| " + " | ".join(_row(cell)) + " |")
    finished = {(cell["topology"], cell["model"]) for cell in cells}
    for topology in TOPOLOGIES:
        for model in MODELS:
            if (topology, model) not in finished:
                lines.append(f"| {topology} | {model.split('/')[1]} |" + " |" * 8 + " not yet run |")
    return "\n".join(lines) + "\n"


def _row(cell: dict) -> list[str]:
    name = cell["model"].split("/")[1]
    pinned = any("pinned_host" in part for part in cell["command"])
    head = [cell["topology"], name + (", anchor pinned" if pinned else ""), str(cell["population"])]
    if "error" in cell:
        return [*head, *[""] * 7, cell["error"].splitlines()[-1]]
    programs, memory = cell["programs"], cell["memory_bytes"]
    peak = {name: program["peak_bytes"] / 2**30 for name, program in programs.items()}
    sent = sum(program["runs"] * program["sent_bytes"] for program in programs.values()) / 1e9
    return [
        *head,
        f"{cell['mesh']['groups']} × {cell['mesh']['model']}",
        str(cell["slots"]),
        f"{max(peak['perturb'], peak.get('decode', 0)):.2f}",
        f"{peak['update']:.2f}" if "update" in peak else "",
        f"{sent:.1f}",
        f"{cell['bound_seconds']:.0f}",
        f"{cell['cpu_seconds']:.0f}",
        f"yes, of {memory / 2**30:.2f}" if cell["fits"] else cell["verdict"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--anchor", default="device", choices=("device", "pinned_host"))
    parser.add_argument("--search", action="store_true", help="let the plan choose mesh and slots")
    parser.add_argument("--json", action="store_true", help="print each new cell as one line of JSON")
    args = parser.parse_args()
    cells = [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []
    commands = [cell["command"] for cell in cells]
    options = {"slots": args.slots, "memory": args.anchor, "search": args.search}
    for topology in filter(None, args.topologies.split(",")):
        for model in filter(None, args.models.split(",")):
            if command(topology, model, **options) in commands:
                continue
            cell = plan(topology, model, **options)
            with CELLS.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            cells.append(cell)
            print(
                json.dumps(cell) if args.json else f"{topology} {model}: {cell.get('verdict', cell.get('error'))}",
                flush=True,
            )
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + BEGIN + table(cells) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
