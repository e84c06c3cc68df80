"""What can be read off any estimator and its parameters: as text, the fitted model, its epochs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline


def describe(estimator: BaseEstimator) -> str:
    """Write an estimator with the parameters that differ from its defaults, on one line."""
    if isinstance(estimator, Pipeline):
        return " | ".join(describe(step) for _, step in estimator.steps)
    with config_context(print_changed_only=True):
        text = " ".join(repr(estimator).split())
    return re.sub(r"<function (\S+) at 0x\w+>", r"\1", text)  # an address says nothing


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Titles of parameters: without their step where that tells them apart all the same."""
    last = [name.rpartition("__")[2] for name in names]
    return {
        name: part if last.count(part) == 1 else name
        for name, part in zip(names, last, strict=True)
    }


def fitted_model(estimator: Any) -> Any:
    """Reach through Pipelines and searches to the fitted model that has the history.

    Of a Pipeline that is its last step with a history, or, where none has one, its last step.
    """
    if isinstance(estimator, Pipeline):
        models = [fitted_model(step) for _, step in reversed(estimator.steps)]
        return next((model for model in models if has_history(model)), models[0])
    if hasattr(estimator, "best_estimator_"):
        return fitted_model(estimator.best_estimator_)
    return estimator


def final_step(estimator: Any) -> Any:
    """The last step of a Pipeline, the best estimator of a search; others as they are."""
    if hasattr(estimator, "best_estimator_"):
        return final_step(estimator.best_estimator_)
    return final_step(estimator.steps[-1][1]) if hasattr(estimator, "steps") else estimator


def has_history(model: Any) -> bool:
    return hasattr(model, "history_") or hasattr(model, "loss_curve_")


def epoch_records(model: Any) -> list[dict[str, Any]]:
    """A row an epoch: of a fitted `history_`, else of the curves of scikit-learn's networks."""
    history = getattr(model, "history_", None)
    if history is None:
        history = {"train_loss": getattr(model, "loss_curve_", [])}
        if hasattr(model, "classes_") and getattr(model, "validation_scores_", None) is not None:
            history["valid_accuracy"] = model.validation_scores_  # a regressor's are R²
    records = pd.DataFrame(history).to_dict("records")
    # skorch keeps its batches inside each epoch's row: they are no column of a table.
    return [
        {"epoch": epoch} | {str(k): v for k, v in record.items() if np.isscalar(v)}
        for epoch, record in enumerate(records, start=1)
    ]
