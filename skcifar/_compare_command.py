"""Command ``python -m skcifar compare``: several classifiers in one table."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from skcifar._command_line import (
    MODELS,
    TABLE_WIDTH,
    Splits,
    UsageError,
    add_data_options,
    announce,
    check_device,
    check_folds,
    check_writable,
    configured,
    integer_from,
    read_splits,
    replacing,
    write_learning_curves,
    write_provenance,
)
from skcifar.model_selection import compare
from skcifar.plotting import LearningCurvesDisplay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# scikit-learn's own take minutes a fold on CIFAR-10, and ImageNet's weights are a download: those
# run when they are named.
DEFAULT_MODELS = {
    "digits": ["softmax", "mlp", "cnn", "triplet", "sklearn-logistic", "sklearn-mlp", "dummy"],
    "mnist": ["softmax", "mlp", "cnn", "triplet", "dummy"],
    "cifar10": ["softmax", "mlp", "cnn", "triplet", "dummy"],
}

PREDICTION_COLUMNS = ["model", "part", "row", "actual", "predicted", "confidence"]
N_WRONG, N_RIGHT = 12, 4  # images of a model that are kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Cross-validate several classifiers on the same folds and print one table. "
        "triplet is TripletEmbedder and nearest neighbours, finetuned FineTunedClassifier on a "
        "TripletEmbedder; alexnet and resnet18 are ImageNet features, whose weights are "
        "downloaded, and MLPClassifier: they keep the features in the data home. "
        "Where there is a test split (of mnist, cifar10 and folders with train and test) the "
        "training split is cross-validated, then each model is fitted to all of it and scored on "
        "the test split."
    )
    add_data_options(parser)
    add = parser.add_argument
    add(
        "--models",
        metavar="A,B,...",
        help=f"of {', '.join(MODELS)}; default: {', '.join(DEFAULT_MODELS['cifar10'])}, and "
        "scikit-learn's for digits",
    )
    add("--cv", type=integer_from(2), default=5, metavar="K", help="stratified folds; default: 5")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="write table.csv, histories.csv, predictions.csv, gallery.npz (images predicted "
        "right and wrong), provenance.json and, with matplotlib, learning_curves.png to DIR",
    )
    add("--quiet", action="store_true", help="no progress on stderr")


def run(arguments: argparse.Namespace) -> int:
    tell = (lambda text: None) if arguments.quiet else announce
    estimators = _estimators(arguments)
    if arguments.output is not None:
        check_writable(arguments.output)

    tell(f"reading {arguments.data}")
    splits = read_splits(arguments)
    train, held_out = splits.train, splits.held_out
    check_folds(train.y, arguments.cv)

    table = compare(
        estimators,
        *train,
        cv=arguments.cv,
        X_test=held_out.X if held_out else None,
        y_test=held_out.y if held_out else None,
        verbose=0 if arguments.quiet else 2,
    ).sort_values("cv_mean", ascending=False, kind="stable")

    title = (
        f"{splits.name}: {len(train.y):,} images of {len(np.unique(train.y))} classes, "
        f"{arguments.cv} folds, seed {arguments.seed}"
    )
    print(f"{title}\n\n{_format(table)}", flush=True)
    if arguments.output is not None:
        try:
            _write_results(table, splits, arguments, title, tell)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot write the results: {error}") from error
    return 1 if table["cv_mean"].isna().all() else 0


def _estimators(arguments: argparse.Namespace) -> dict[str, BaseEstimator]:
    check_device(arguments.device)
    if arguments.models is None:
        names = DEFAULT_MODELS.get(arguments.data, DEFAULT_MODELS["cifar10"])  # or a folder's
    else:
        names = [name.strip() for name in arguments.models.split(",")]
    for name in names:
        if name not in MODELS:
            raise UsageError(
                f"argument --models: unknown model {name!r}; choose from {', '.join(MODELS)}"
            )
        if names.count(name) > 1:
            raise UsageError(f"argument --models: {name!r} is named more than once")
    return {name: configured(MODELS[name](arguments.device), arguments) for name in names}


# -- results ---------------------------------------------------------------------------------------


def _format(table: pd.DataFrame) -> str:
    """Lay the table out in columns; an error follows its row."""
    header = ["model", "cv accuracy", "difference, 95% interval"]
    header += ["train", "test", "fit s", "predict s", "epochs"]
    lines = [header, *(_cells(row) for row in table.to_dict("records"))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line, error in zip(lines, [None, *table["error"]], strict=True):
        words = [word.ljust(width) for word, width in zip(line[:3], widths[:3], strict=True)]
        words += [word.rjust(width) for word, width in zip(line[3:], widths[3:], strict=True)]
        text.append("  ".join(words).rstrip())
        if isinstance(error, str):
            text.append("  " + textwrap.shorten(f"failed: {error}", TABLE_WIDTH - 2))
    return "\n".join(text)


def _cells(row: dict[Hashable, Any]) -> list[str]:
    def number(column: str, digits: int) -> str:
        return "-" if np.isnan(row[column]) else f"{row[column]:.{digits}f}"

    if np.isnan(row["cv_mean"]):
        accuracy, difference = "-", "-"
    else:
        accuracy = "{cv_mean:.4f} ± {cv_std:.4f}".format_map(row)
        interval = "{difference:+.4f} [{difference_low:+.4f}, {difference_high:+.4f}]"
        difference = "best" if row["difference"] == 0 else interval.format_map(row)
    return [
        row["model"],
        accuracy,
        difference,
        number("train_score", 4),
        number("test_score", 4),
        number("fit_seconds", 2),
        number("predict_seconds", 3),
        number("epochs", 0),
    ]


def _write_results(
    table: pd.DataFrame,
    splits: Splits,
    arguments: argparse.Namespace,
    title: str,
    tell: Callable[[str], None],
) -> None:
    folder = arguments.output
    # taken off, for pandas copies them with every column that is looked at
    predictions = _predictions(table.attrs.pop("predictions"), table, splits.class_names)
    columns = None if table.attrs["histories"] else ["model", "fold", "epoch"]
    histories = pd.DataFrame(table.attrs["histories"], columns=columns)
    with replacing(folder / "table.csv") as path:
        tracebacks = table["model"].map(table.attrs["tracebacks"])
        table.assign(traceback=tracebacks).to_csv(path, index=False)
    with replacing(folder / "histories.csv") as path:
        histories.to_csv(path, index=False)
    with replacing(folder / "predictions.csv") as path:
        predictions.to_csv(path, index=False, float_format="%.6g")
    with replacing(folder / "gallery.npz") as path:
        part, rows, images = _gallery(predictions, splits)
        np.savez_compressed(path, part=np.array(part), rows=rows, images=images)
    write_provenance(arguments, "comparison", title, splits)
    names = "table.csv, histories.csv, predictions.csv, gallery.npz and provenance.json"
    tell(f"wrote {names} to {folder}")
    why_none = "no model recorded its epochs" if histories.empty else None
    draw = partial(_draw_learning_curves, histories, table, title)
    write_learning_curves(folder, draw, tell, why_none=why_none)


def _predictions(
    predictions: dict[str, Any], table: pd.DataFrame, class_names: list[str]
) -> pd.DataFrame:
    """All models', the best first, with names of classes in place of codes."""
    frames = [pd.DataFrame(columns=PREDICTION_COLUMNS)]
    names = dict(enumerate(class_names))
    for model in table["model"]:
        if model in predictions:
            frame = pd.DataFrame(predictions[model]).assign(model=model)
            for column in "actual", "predicted":
                # a model may predict what is no class, such as a label of outliers
                frame[column] = [names.get(code, str(code)) for code in frame[column]]
            frames.append(frame.astype({"confidence": float})[PREDICTION_COLUMNS])
    return pd.concat(frames[1:] or frames, ignore_index=True)


def _gallery(
    predictions: pd.DataFrame, splits: Splits
) -> tuple[str, NDArray[np.int64], NDArray[np.uint8]]:
    """The part, rows (k,) and images (k, h, w[, 3]) of each model's surest errors and successes."""
    rows: set[int] = set()
    for _, of_model in predictions.groupby("model"):
        # without confidence, the first come first
        surest = of_model.sort_values("confidence", ascending=False, kind="stable")
        right = surest["actual"] == surest["predicted"]
        rows |= {*surest[~right]["row"].head(N_WRONG), *surest[right]["row"].head(N_RIGHT)}
    part, images = "test", splits.held_out
    if images is None:
        part, images = "left out", splits.train
    chosen = np.array(sorted(rows), dtype=np.int64)
    pixels = images.X[chosen].reshape(-1, *splits.image_shape)
    if len(splits.image_shape) == 2:
        # grey, of which scikit-learn's digits have 17 levels
        pixels = np.rint(pixels * (255 / max(images.X.max(), 1))).astype(np.uint8)
    return part, chosen, pixels


def _draw_learning_curves(histories: pd.DataFrame, table: pd.DataFrame, title: str) -> Figure:
    """Draw what models recorded, each named with its accuracy on the folds left out."""
    recorded = dict(iter(histories.groupby("model")))
    scores = zip(table["model"], table["cv_mean"], strict=True)
    display = LearningCurvesDisplay.from_histories(
        {f"{name} ({score:.1%})": recorded[name] for name, score in scores if name in recorded},
        loss_scale="log",  # losses of several kinds, and their penalties
    )
    figure: Any = display.figure_  # of its own
    subtitle = (
        "mean over folds, shaded from lowest to highest; in brackets accuracy on left-out folds"
    )
    # a folder's name is no formula, whatever it holds
    figure.suptitle(f"{textwrap.fill(title, 90)}\n{subtitle}", parse_math=False)
    return figure
