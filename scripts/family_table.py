"""Write the table of families in docs/models.md: what works with a tiny model of each, tried here and now.

scripts/family_table.py [FAMILY ...]     these alone; without any, all (about 20 minutes on two cores)

It needs torchvision, and timm for one family; `genrecal doctor` says how to install torchvision.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]


def main(chosen: list[str]) -> None:
    from conftest import mixed_samples, write_llava
    from families import SPECS, can_run, genrecal, rows_of, run_family, write_rows
    from tiny_models import make

    rows = rows_of() if chosen else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_llava(folder / "data", mixed_samples(6))
        teacher = make("qwen2_vl", folder / "qwen2_vl")
        made, text = genrecal(
            "cache", f"--teacher={teacher}", f"--data={data}", f"--out={folder / 'cache'}", "--device=cpu"
        )
        assert made == "works", text
        for family in chosen or sorted(SPECS):
            if not can_run(family):
                raise SystemExit(f"{family}: needs torchvision (and timm)")
            rows[family] = run_family(family, folder / family, data, folder / "cache")
            print(family, rows[family], flush=True)
            write_rows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
