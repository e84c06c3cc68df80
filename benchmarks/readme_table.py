"""Write the tables of README.md from the committed results.

    python benchmarks/readme_table.py

Each table stands between two marks, `<!-- NAME: begin -->` and `<!-- NAME: end -->`:

reached
    What the defaults reach, from defaults.csv, and airbench94, from airbench.csv.
speed
    Ours against peers, from the other CSVs. A line whose rows nobody has measured yet is left out;
    a row that could not be measured where the others were says so.
reproduced
    The reports' systems, from the records that
    `python -m skcifar reproduce ID ... --output benchmarks/results/reproduce` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from skcifar._reproduce_command import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# estimator, rows of defaults.csv for MNIST and CIFAR-10
REACHED = [
    ("`SoftmaxRegression`", "mnist-softmax", "cifar10-softmax"),
    ("`MLPClassifier`", "mnist-mlp", "cifar10-mlp"),
    ("`CNNClassifier`", "mnist-cnn", "cifar10-cnn"),
    ("`CNNClassifier`, `horizontal_flip=True, tta=True`", "", "cifar10-cnn-flip-tta"),
    ('`CNNClassifier`, `architecture="airbench94", tta=True`', "", "airbench94_cpu"),
]

SCIKIT_LEARN = "scikit-learn's `MLPClassifier`"
# what, against what, and the file:row of each figure
SPEED = [
    ("softmax regression, an epoch, batch 256", "skorch", "fit:softmax_epoch"),
    (
        "the same",
        "scikit-learn / scikeras / a plain torch loop",
        "peers:softmax_scikit-learn peers:softmax_scikeras peers:softmax_torch",
    ),
    (
        "200 hidden units, an epoch, batch 500, float32 / bfloat16",
        f"{SCIKIT_LEARN}, float32",
        "fit:mlp_float32 fit:mlp_bfloat16",
    ),
    (
        "the same in float32",
        "skorch / scikeras / a plain torch loop",
        "peers:mlp_skorch peers:mlp_scikeras peers:mlp_torch",
    ),
    (
        "small CNN, an epoch, batch 128, float32 / bfloat16",
        "a plain torch loop, float32",
        "fit:cnn_float32 fit:cnn_bfloat16",
    ),
    ("the same in float32", "skorch / scikeras", "peers:cnn_skorch peers:cnn_scikeras"),
    (
        "a triplet step, batch 2,048, random / semi-hard / hard",
        "pytorch-metric-learning, same network",
        "embedding:step-random-library embedding:step-semihard-library embedding:step-hard-library",
    ),
    (
        "all triplets of a batch of 256",
        "pytorch-metric-learning",
        "embedding:step-all-256-library",
    ),
    (
        "ResNet-18 features of 224 pixels, bfloat16 ({images_a_second} images a second) / float32",
        "a plain torch loop, float32",
        "features:resnet18 features:resnet18-float32",
    ),
    (
        "softmax regression to the optimum, C = 1e-3",
        "scikit-learn's `LogisticRegression`, 150 iterations",
        "logistic:logistic_time",
    ),
    (
        "a grid of 27 fits, 32 units, MNIST-10k, batch 200 / 32",
        "our own fits, one by one",
        "sweep:mlp_32_batch_200_own sweep:mlp_32_batch_32_own",
    ),
    ("the same", f"{SCIKIT_LEARN}, `n_jobs=2`", "sweep:mlp_32_batch_200 sweep:mlp_32_batch_32"),
    (
        "the same",
        "skorch, one by one",
        "sweep:mlp_32_batch_200_skorch sweep:mlp_32_batch_32_skorch",
    ),
    (
        "the same with 100 units, batch 200, float32 / bfloat16",
        f"{SCIKIT_LEARN}, `n_jobs=2`",
        "sweep:mlp_100_batch_200 sweep:mlp_100_bfloat16",
    ),
    (
        "a grid of 27 softmax regressions, CIFAR-10, 10,000 images",
        "our own fits / `SGDClassifier`, `n_jobs=2`",
        "sweep:softmax_own sweep:softmax_sgdclassifier",
    ),
    (
        "`predict` of one image: softmax regression / 200 hidden units / small CNN",
        "skorch",
        "predict:latency_softmax_predict_uint8_skorch predict:latency_mlp_predict_uint8_skorch "
        "predict:latency_cnn_predict_uint8_skorch",
    ),
    (
        "the same",
        "scikit-learn's `LogisticRegression` / `MLPClassifier`",
        "predict:latency_softmax_predict_uint8_scikit_learn "
        "predict:latency_mlp_predict_uint8_scikit_learn",
    ),
    (
        "`predict` of 50,000 images: the same three",
        "skorch",
        "predict:throughput_softmax_skorch predict:throughput_mlp_skorch "
        "predict:throughput_cnn_skorch",
    ),
    (
        "`predict` of 50,000 images: softmax regression / 200 hidden units",
        "scikit-learn's `LogisticRegression` / `MLPClassifier`",
        "predict:throughput_softmax_scikit_learn predict:throughput_mlp_scikit_learn",
    ),
    (
        "`fit` from a memory-mapped file: softmax regression / 200 hidden units / small CNN",
        "the same rows in memory",
        "streaming:throughput_softmax_sgd streaming:throughput_mlp streaming:throughput_cnn",
    ),
    ("a grid of 27 fits, 32 units, MNIST-10k, on a GPU", "skorch, one by one", "sweep:gpu_27"),
]


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        begin, end = marks(name)
        before, rest = readme.split(begin)
        after = rest.split(end)[1]
        readme = f"{before}{begin}\n{table(RESULTS)}\n{end}{after}"
    path.write_text(readme, encoding="utf-8")


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def reached(results: Path) -> str:
    files = [results / "defaults.csv", results / "airbench.csv"]
    rows = pd.concat([pd.read_csv(path, index_col="name") for path in files if path.exists()])
    lines = ["| | MNIST, 60,000 | CIFAR-10 (JPEG), 50,000 |", "|---|---|---|"]
    for estimator, *names in REACHED:
        if not set(filter(None, names)) <= set(rows.index):
            continue
        cells = [
            f"{rows.figure[name]:.1%}, {rows.ours_s[name]:.0f} s" if name else "" for name in names
        ]
        lines.append(f"| {estimator} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed(results: Path) -> str:
    tables = {path.stem: pd.read_csv(path) for path in results.glob("*.csv")}
    rows = {
        f"{stem}:{row['name']}": row
        for stem, table in tables.items()
        if {"name", "figure"} <= set(table)
        for _, row in table.iterrows()
    }
    lines = ["| what | against | times faster |", "|---|---|---|"]
    for what, against, names in SPEED:
        found = [rows[name] for name in names.split() if name in rows]
        if len(found) < len(names.split()):
            continue
        rate = f"{found[0]['n'] / found[0]['ours_s']:.0f}"
        cells = unique([figure(row) for row in found])
        lines.append(f"| {what.format(images_a_second=rate)} | {against} | {' / '.join(cells)} |")
    if "sweep_scaling" in tables:
        cost = tables["sweep_scaling"].set_index("networks")["ms_per_network_epoch"]
        lines += [
            "",
            f"A network of 32 units costs {cost[1]:.1f} ms an epoch of 6,667 images alone, "
            f"{cost[8]:.1f} among 8, {cost[64]:.1f} among 64.",
        ]
    return "\n".join(lines)


def figure(row: pd.Series) -> str:
    """Two digits, or that there is none."""
    if pd.isna(row["figure"]):
        return str(row["note"]).partition(":")[0]  # of "not measured: it is not installed"
    return f"{row['figure']:.1f}" if row["figure"] < 9.95 else f"{row['figure']:.0f}"


def unique(cells: list[str]) -> list[str]:
    """Once, where there is nothing but one and the same text."""
    return cells[:1] if len(set(cells)) == 1 and cells[0].startswith("not") else cells


TABLES: dict[str, Callable[[Path], str]] = {
    "reached": reached,
    "speed": speed,
    "reproduced": lambda results: markdown_table(results / "reproduce"),
}

if __name__ == "__main__":
    main()
