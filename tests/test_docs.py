"""The README's code runs, and every public docstring is complete numpydoc."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest
from numpydoc.validate import ERROR_MSGS, validate

import skcifar

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"(?P<skip><!-- not run: [^>]+-->\s*)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
CHECKS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["numpydoc_validation"]
LEFT_OUT = set(CHECKS["checks"]) - {"all"}


def python_blocks(text):
    """Each ```python block that is to run: the number of its first line and its code."""
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"])
        for match in FENCE.finditer(text)
        if not match["skip"]
    ]


def test__readme__code_runs_in_order(tmp_path, monkeypatch):
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert blocks, "README.md shows no python code"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for line, code in blocks:
        # Blank lines in front, so that a traceback gives the README's own line numbers.
        exec(compile("\n" * (line - 1) + code, "README.md", "exec"), namespace)


def test__readme_reader__skips_only_what_says_why():
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n<!-- not run: slow -->\n\n```python\ny\n```\n"
    assert python_blocks(text) == [(3, "x = 1\n")]


def public_objects():
    """Dotted names of what a user may call: functions, classes and the methods we define."""
    places = {"skcifar": skcifar}
    for path in sorted((ROOT / "skcifar").glob("[!_]*.py")):
        places[f"skcifar.{path.stem}"] = importlib.import_module(f"skcifar.{path.stem}")
    found = {}
    for place, module in places.items():
        for name in getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"]):
            member = getattr(module, name)
            # A file offers what it defines, the package what it lists; imported names are neither.
            if callable(member) and (path_of(member) == place or module is skcifar):
                # Once each, under the shortest name: skcifar.X before skcifar.x.X.
                found.setdefault(id(member), (f"{place}.{name}", member))
    for dotted, member in found.values():
        yield dotted
        if inspect.isclass(member):
            for name, method in inspect.getmembers(member, inspect.isroutine):
                if name[0] != "_" and path_of(method).startswith("skcifar."):
                    yield f"{dotted}.{name}"


def path_of(member):
    return getattr(member, "__module__", None) or ""


@pytest.mark.parametrize("dotted", list(public_objects()))
def test__public_docstring__is_complete_numpydoc(dotted):
    report = validate(dotted)
    left_out = LEFT_OUT | {"EX01"} if is_method(dotted) else LEFT_OUT
    errors = [f"{code} {message}" for code, message in report["errors"] if code not in left_out]
    assert not errors


def test__numpydoc_checks__exist():
    assert CHECKS["checks"][0] == "all" and set(ERROR_MSGS) >= LEFT_OUT


def is_method(dotted):
    # skcifar.SoftmaxRegression.fit, skcifar.plotting.SomeDisplay.plot: the owner is a class.
    return dotted.split(".")[-2][0].isupper()
