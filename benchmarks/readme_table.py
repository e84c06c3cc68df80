"""Write the table of reproduced systems into README.md, from the committed records.

    python benchmarks/readme_table.py

The records come from `python -m skcifar reproduce ID ... --output benchmarks/results/reproduce`.
"""

from __future__ import annotations

from pathlib import Path

from skcifar._reproduce_command import markdown_table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- reproduced: begin -->", "<!-- reproduced: end -->"


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    table = markdown_table(ROOT / "benchmarks" / "results" / "reproduce")
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
