"""One way up: a file imports only from the files above it (CONTRIBUTING.md lists them)."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "skcifar"
ESTIMATORS = ["softmax", "mlp", "cnn", "triplet", "pretrained", "finetune"]
READERS = ["datasets", "metrics", "preprocessing", "plotting", "model_selection", "report"]
# From the bottom up. Modules of one row do not import each other.
# What readers are made of, and nobody else imports.
PARTS = {
    "datasets": {"_image_folder"},
    "plotting": {"_curve_displays", "_embedding_display", "_image_displays", "_sweep_displays"},
    "model_selection": {"_search", "_fitted"},
    "report": {"_report_files", "_report_pieces", "_fitted"},
}
ROWS = [
    ["_provenance", "_image_folder", "_fitted", "_memory", "_processes"],
    ["_device"],
    ["_stored_rows"],
    ["_matmul"],
    ["_networks"],
    ["_architectures"],
    ["_lbfgs", "_muon", "_recorded", "_tape"],
    ["_optimization", "_metric_learning"],
    ["_batches"],
    ["_jobs"],
    ["_conductor"],
    ["_training"],
    ["_stacked_parameters", "_stacked_loss"],
    ["_stacked_networks"],
    ["_stack"],
    ["_row_cache", "_checkpoints"],
    ["_parameters"],
    ["_base"],
    ["_supervised", "_encoder"],
    ["_convolutional", "_classifier"],
    ["softmax", "mlp", "cnn", "triplet", "pretrained"],
    ["finetune"],
    ["_tasks", "_journal", "_comparison", "_search_parameters"],
    ["_rounds"],
    ["_sharing", "_study"],
    ["_meeting"],
    ["_backend", "_plan"],
    ["_groups"],
    ["_dask"],
    ["_search"],
    ["_display"],
    ["_curve_displays", "_embedding_display", "_image_displays", "_sweep_displays"],
    ["_report_files"],
    ["_report_pieces"],
    *([module] for module in READERS),
    ["_protocols"],
    ["_exercises", "_reproduction"],
    ["reproduce"],
    ["__init__"],
    ["_command_line"],
    ["_compare_command", "_grid_argument", "_sweep_results"],
    ["_sweep_command", "_report_command", "_reproduce_command"],
    ["__main__"],
]
ROW_OF = {module: row for row, modules in enumerate(ROWS) for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.rglob("*.py"))


def test__every_module__has_a_row():
    assert set(MODULES) <= set(ROW_OF), "name the new module in ROWS and in CONTRIBUTING.md"
    assert not [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]


@pytest.mark.parametrize("module", MODULES)
def test__imports__point_down_only(module):
    below = {name for name, row in ROW_OF.items() if row < ROW_OF[module]}
    wrong = own_imports(parse(module)) - below
    assert not wrong, f"{module} imports {wrong}, which are not below it"


@pytest.mark.parametrize("module", [module for module in READERS if module in MODULES])
def test__reader__names_nothing_private_and_no_estimator(module):
    tree = parse(module)
    private = {name for name in own_imports(tree) if name.startswith("_")}
    assert private <= PARTS.get(module, set())
    classes = {
        node.name
        for estimator in set(ESTIMATORS) & set(MODULES)
        for node in parse(estimator).body
        if isinstance(node, ast.ClassDef)
    }
    assert classes, "there are estimators to look for"
    assert not names(tree) & classes


def test__skorch__is_imported_by_training_only():
    assert [module for module in MODULES if "skorch" in foreign_imports(parse(module))] in (
        ["_optimization"],
        ["_training"],
        [],
    )


def test__foreign_imports__are_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.match(r"[\w-]+", line)[0] for lines in lists for line in lines}
    imported_as = {"scikit-learn": "sklearn", "pillow": "PIL"}
    declared = {imported_as.get(name, name) for name in declared}
    imported = set().union(*(foreign_imports(parse(module)) for module in MODULES))
    assert not imported - declared - sys.stdlib_module_names


def test__imports__are_seen_in_every_form():
    # The checks above hold only if this reading of imports misses none.
    tree = ast.parse(
        "from . import _device, __version__\n"
        "from ._base import x\n"
        "import skcifar.mlp as m, numpy.linalg\n"
        "from skcifar import cnn, SoftmaxRegression\n"
        "def f():\n"
        "    from skcifar.report import y\n"
        "    from torch.nn import functional\n"
    )
    assert own_imports(tree) == {"_device", "__init__", "_base", "mlp", "cnn", "report"}
    assert foreign_imports(tree) == {"numpy", "torch"}
    assert {"x", "SoftmaxRegression", "f"} <= names(tree)


def test__project_text__holds_no_path_of_one_machine():
    home = re.compile(r"(?<![\w.~}-])/(work|root|home)/")
    folders = [PACKAGE] + [ROOT / name for name in ("tests", "benchmarks", "examples", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*")]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile"]
    texts = {p: p.read_text() for p in files if p.is_file() and p.suffix not in {".pyc", ".png"}}
    assert len(texts) > 10
    assert not [str(path.relative_to(ROOT)) for path, text in texts.items() if home.search(text)]


def parse(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def own_imports(tree):
    """The modules of skcifar that a tree imports, at any depth; `__init__` for its own names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            paths = [".".join(filter(None, ["skcifar" if node.level else "", node.module]))]
        else:
            continue
        for top, *rest in (path.split(".") for path in paths):
            if top == "skcifar" and rest:
                found.add(rest[0])
            elif top == "skcifar":
                # `from skcifar import a`: the module a, or a name that __init__ defines.
                found |= {a.name if a.name in ROW_OF else "__init__" for a in node.names}
    return found


def foreign_imports(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - {"skcifar"}


def names(tree):
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
    return found
