"""What a system of a report is, and how it becomes a record."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator

from skcifar import datasets
from skcifar._device import resolve_device
from skcifar._fitted import describe
from skcifar._protocols import (
    FULL,
    QUICK,
    Images,
    Outcome,
    Protocol,
    Scale,
    joined,
    smaller,
    with_everywhere,
)
from skcifar._provenance import data_provenance, machine, now, provenance, versions

SCHEMA = "skcifar reproduction 1"


@dataclass(frozen=True)
class Row:
    """One way to build a system.

    Attributes
    ----------
    estimator : estimator, dict of str to estimator, or None
        Several models are run one after another by the same protocol; None where the protocol
        looks at the data alone.
    protocol : callable
        Of `_protocols`.
    reported : dict of str to float
        The report's figures, by the names of the protocol's.
    """

    estimator: BaseEstimator | Mapping[str, BaseEstimator] | None
    protocol: Protocol
    reported: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One system of a report.

    Attributes
    ----------
    title : str
    data : "cifar10" or "mnist"
    reported : str
        What the report says it reached.
    headline : str
        The figure that stands for the system in a table; "" where there is only a picture.
    rows : dict of str to Row
    minutes : float or None
        What the report says it took.
    classes : list of str or None
        Of the data; None is all.
    note : str
        What the report leaves open, and what stands here in its place.
    """

    title: str
    data: str
    reported: str
    headline: str
    rows: Mapping[str, Row]
    minutes: float | None = None
    classes: list[int | str] | None = None
    note: str = ""


def run(
    name: str,
    system: System,
    rows: Sequence[str],
    quick: bool,
    settings: dict[str, Any],
    folder: str | os.PathLike[str] | None,
    progress: Callable[[str], None] | None,
    callbacks: Sequence[Any],
    keep: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """The record of a system, some of whose rows are run with estimators of these settings."""
    if folder is not None:
        import matplotlib.pyplot  # noqa: F401 - before hours of training, not after

        Path(folder).mkdir(parents=True, exist_ok=True)
    scale = QUICK if quick else FULL
    images = read(system.data, settings["data_home"], tuple(system.classes or ()))
    fewer, scaled = smaller(images, scale)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "id": name,
        "title": system.title,
        "quick": quick,
        "reported": system.reported,
        "reported_minutes": system.minutes,
        "headline": system.headline,
        "rows": [],
        "pictures": [],
        "note": system.note,
        "provenance": _provenance(name, system, images, rows, quick, settings),
    }
    if keep is not None:
        keep(record)
    for row_name in rows:
        if progress is not None:
            progress(row_name)
        outcome = _run_row(system.rows[row_name], fewer, scale, settings, callbacks)
        row = _recorded(row_name, system.rows[row_name], outcome, scaled, settings)
        if folder is not None:
            stem = f"{name}{'.quick' if quick else ''}-{_slug(row_name)}"
            row["pictures"] = _drawn(stem, outcome, Path(folder))
        record["rows"].append(row)
        record["pictures"] += row["pictures"]
        if keep is not None:
            keep(record)
    return record


def read(data: str, data_home: Any, classes: tuple[int | str, ...]) -> Images:
    """Both splits of a data set, of all classes where none are named."""
    fetch: Callable[..., Any] = getattr(datasets, f"fetch_{data}")
    train, test = (
        fetch(data_home=data_home, subset=subset, classes=classes or None, as_images=True)
        for subset in ("train", "test")
    )
    height, width, *channels = train.images.shape[1:]
    return Images(
        train.images.reshape(len(train.images), -1),
        train.target,
        test.images.reshape(len(test.images), -1),
        test.target,
        train.target_names.tolist(),
        (height, width, *(channels or [1])),
    )


def _run_row(
    row: Row, images: Images, scale: Scale, settings: dict[str, Any], callbacks: Sequence[Any]
) -> Outcome:
    def run(estimator: BaseEstimator | None) -> Outcome:
        if estimator is None:
            return row.protocol(None, images, scale)
        ready = with_everywhere(scale.estimator(estimator), **settings)
        # scikit-learn wants them on what fit is called of, not on what that one clones
        if callbacks and row.protocol.fits_as_given and hasattr(ready, "set_callbacks"):
            ready.set_callbacks(*callbacks)
        return row.protocol(ready, images, scale)

    if isinstance(row.estimator, Mapping):
        return joined({label: run(estimator) for label, estimator in row.estimator.items()})
    return run(row.estimator)


def _recorded(
    name: str, row: Row, outcome: Outcome, scaled: str | None, settings: dict[str, Any]
) -> dict[str, Any]:
    if isinstance(row.estimator, Mapping):
        estimator = "; ".join(f"{label}: {describe(e)}" for label, e in row.estimator.items())
    else:
        estimator = "" if row.estimator is None else describe(row.estimator)
    summary = (inspect.getdoc(row.protocol) or "").partition("\n")[0]
    return {
        "name": name,
        "estimator": estimator,
        "protocol": f"{row.protocol!r}: {summary}",
        "scaled": scaled,
        "figures": outcome.figures,
        "reported_figures": dict(row.reported),
        "seconds": outcome.seconds,
        "epochs": outcome.epochs,
        "curve": [{k: _six_digits(v) for k, v in row.items()} for row in outcome.curve],
        "classes": outcome.classes,
        "confusion": outcome.confusion,
        "note": outcome.note,
        "pictures": [],
        "date": now(),
        "seed": settings["random_state"],
        "device": str(resolve_device(settings["device"])),
        "machine": machine(),
        "versions": versions(),
    }


def _six_digits(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)


def _drawn(stem: str, outcome: Outcome, folder: Path) -> list[str]:
    """Write a row's pictures; their file names."""
    import matplotlib.pyplot as plt

    files: list[str] = []
    for draw in outcome.pictures:
        file = f"{stem}-{len(files) + 1}.png"
        try:
            figure = draw().figure_
            figure.savefig(folder / file, dpi=110)
            plt.close(figure)
        except Exception as error:  # the trainings behind it may have taken hours
            warnings.warn(f"{file} was not drawn: {error}", UserWarning, stacklevel=2)
            continue
        files.append(file)
    return files


def _provenance(
    name: str,
    system: System,
    images: Images,
    rows: Sequence[str],
    quick: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    data = data_provenance(
        system.data,
        *images[:4],
        image_shape=images.image_shape,
        class_names=images.names(),
    )
    command = ["reproduce", name, *(["--quick"] if quick else [])]
    if len(rows) < len(system.rows):
        command += [word for row in rows for word in ("--rows", row)]
    command += ["--device", str(settings["device"]), "--seed", str(settings["random_state"])]
    seed = settings["random_state"]
    return provenance("reproduction", system.title, seed, data, command=command)
