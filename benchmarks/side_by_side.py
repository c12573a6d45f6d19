"""One benchmark on two revisions, in turns and in one run, and the ratios of every number that it prints in tables.

    python benchmarks/side_by_side.py OLD NEW [--repeat 3] -- benchmarks/codecs.py [its arguments]

OLD and NEW are git revisions, or "." for the working tree as it is. Script and package are those of the revision. The revisions
take turns, as a machine's speed changes within the hour; a ratio is the median over rounds of NEW / OLD. Rows are paired by
their cells that are no numbers, and by their order where several agree.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?")
Rows = dict[tuple[str, ...], dict[str, float]]  # by the cells that are no numbers: the numbers by column


def tables(text: str) -> Rows:
    """The Markdown tables in what a benchmark printed."""
    rows: Rows = {}
    head: list[str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None or head is None:
            head = cells
        elif set(line) - set("| -:"):
            numbers = {name: NUMBER.match(cell) for name, cell in zip(head, cells, strict=False)}
            name = tuple(cell for column, cell in zip(head, cells, strict=False) if numbers[column] is None)
            key = next((*name, f"row {n}") for n in range(1, 10**6) if (*name, f"row {n}") not in rows)
            rows[key] = {column: float(found[0].replace(",", "")) for column, found in numbers.items() if found}
    return rows


def run(folder: Path, command: list[str]) -> Rows:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name}: {' '.join(command)} failed with status {done.returncode}")
    return tables(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("command", nargs="+", help="the script and its arguments, after --")
    options = parser.parse_args()
    found: dict[str, list[Rows]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as root:
        folders = {"old": Path(root) / "old", "new": Path(root) / "new"}
        for name, folder in folders.items():
            if (revision := getattr(options, name)) == ".":
                folders[name] = Path.cwd()
            else:
                subprocess.run(["git", "worktree", "add", "--detach", "-q", str(folder), revision], check=True)
        try:
            for _ in range(options.repeat):
                for name, folder in folders.items():
                    found[name].append(run(folder, options.command))
        finally:
            for folder in folders.values():
                if folder.is_relative_to(root):
                    subprocess.run(["git", "worktree", "remove", "--force", str(folder)], check=False)
    print(f"ratios {options.new} / {options.old}, medians of {options.repeat} rounds")
    for key in dict.fromkeys([*found["old"][0], *found["new"][0]]):
        pairs = [(old[key], new[key]) for old, new in zip(*found.values(), strict=True) if key in old and key in new]
        columns = [name for name, value in (pairs[0][0] if pairs else {}).items() if value and name in pairs[0][1]]
        ratios = [f"{name} {statistics.median(new[name] / old[name] for old, new in pairs):.3f}" for name in columns]
        print(f"{', '.join(key)}: {'; '.join(ratios) or 'printed by one revision only'}")


if __name__ == "__main__":
    main()
