"""The README's tables are those that benchmarks/readme_table.py makes of the committed results."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))


@pytest.mark.parametrize("name", ["reached", "speed", "reproduced"])
def test__table__is_that_of_the_committed_results(name):
    begin, end = (mark + "\n" for mark in SCRIPT["marks"](name))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(begin) == readme.count(end) == 1
    shown = readme[readme.index(begin) + len(begin) : readme.index(end)]
    assert shown == SCRIPT["TABLES"][name](ROOT / "benchmarks" / "results") + "\n"


def test__every_table_between_marks__is_made_by_the_script():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(": begin -->") == readme.count(": end -->") == len(SCRIPT["TABLES"])


def test__row_without_a_figure__says_so_and_a_row_that_is_missing_takes_its_line_along(tmp_path):
    (tmp_path / "fit.csv").write_text(
        "name,ours_s,figure,n,note\n"
        "mlp_float32,0.5,1.94,50000,\n"
        "mlp_bfloat16,0.5,12.3,50000,\n"
        "cnn_float32,0.5,2.1,10000,\n"
    )
    (tmp_path / "peers.csv").write_text(
        "name,ours_s,figure,n,note\n"
        "cnn_skorch,0.5,1.44,10000,\n"
        "cnn_scikeras,,,10000,not measured: scikeras is not installed\n"
    )
    (tmp_path / "sweep.csv").write_text(
        "name,ours_s,figure,n,note\ngpu_27,,,10000,not measured on a GPU\n"
    )
    lines = SCRIPT["speed"](tmp_path).split("\n")
    assert [line.split(" | ")[-1] for line in lines[2:]] == [
        "1.9 / 12 |",
        "1.4 / not measured |",
        "not measured on a GPU |",
    ]
