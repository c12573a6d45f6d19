"""Write the tables of pairs in docs/models.md from the results of the tests that run them (`make support-matrix`).

scripts/support_matrix.py RESULTS.xml [RESULTS.xml ...]     what `pytest --junitxml` wrote
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- pairs: written by scripts/support_matrix.py -->", "<!-- end of pairs -->"

NAMES = {
    "qwen2_vl_72b": "Qwen2-VL-72B",
    "internvl2_76b": "InternVL2-76B",
    "internvl2_5_78b": "InternVL2.5-78B",
    "nvlm_d_72b": "NVLM-D-72B",
    "qwen2_vl_2b": "Qwen2-VL-2B",
    "qwen2_vl_7b": "Qwen2-VL-7B",
    "internvl2_5_1b": "InternVL2.5-1B",
    "internvl2_5_2b": "InternVL2.5-2B",
    "internvl2_5_4b": "InternVL2.5-4B",
    "internvl2_5_8b": "InternVL2.5-8B",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl_qwen2": "InternVL3",
    "llava_onevision": "LLaVA-OneVision",
    "gemma3": "Gemma 3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "qwen2": "Qwen2 (text)",
    "llama3": "Llama 3 (text)",
}
TEACHERS, STUDENTS = list(NAMES)[:4], list(NAMES)[4:10]
Pair = tuple[str, str, str]  # teacher, student, backend of the cache job


def results(paths: list[Path]) -> dict[Pair, bool]:
    """Whether each pair's test passed; those that were skipped are left out."""
    found: dict[Pair, bool] = {}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            passed = not any(case.findall(kind) for kind in ("failure", "error"))
            for item in case.iterfind("properties/property[@name='pair']"):
                if case.find("skipped") is None:
                    teacher, student, backend = item.attrib["value"].split()
                    found[teacher, student, backend] = passed
    return found


def tables(found: dict[Pair, bool]) -> str:
    """The paper's pairs as a matrix, the others as a list. A cell is the backend that cached the teacher, or "failed"."""
    cells = {
        (teacher, student): backend if passed else "**failed**" for (teacher, student, backend), passed in found.items()
    }
    lines = ["| teacher \\ student | " + " | ".join(NAMES[name] for name in STUDENTS) + " |", "| --- " * 7 + "|"]
    for teacher in TEACHERS:
        row = [cells.pop((teacher, student), "not run") for student in STUDENTS]
        lines.append(f"| {NAMES[teacher]} | " + " | ".join(row) + " |")
    lines += ["", "| teacher | student | cached by |", "| --- | --- | --- |"]
    order = list(NAMES)
    for teacher, student in sorted(cells, key=lambda pair: tuple(map(order.index, pair))):
        lines.append(f"| {NAMES[teacher]} | {NAMES[student]} | {cells[teacher, student]} |")
    return "\n".join(lines)


def pairs_of(page: str) -> dict[Pair, bool]:
    """The other way: what the page's tables say."""
    ids = {name: key for key, name in NAMES.items()}
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in page.split(BEGIN)[1].split(END)[0].splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]
    matrix, others = rows[: len(TEACHERS) + 1], rows[len(TEACHERS) + 2 :]
    listed = [
        (row[0], student, cell) for row in matrix[1:] for student, cell in zip(matrix[0][1:], row[1:], strict=True)
    ]
    listed += [(teacher, student, cell) for teacher, student, cell in others]
    return {(ids[teacher], ids[student], cell): cell in ("hf", "vllm") for teacher, student, cell in listed}


def main(paths: list[Path]) -> None:
    page = PAGE.read_text()
    written = f"{BEGIN}\n{tables(results(paths))}\n{END}"
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: written, page, flags=re.DOTALL))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
