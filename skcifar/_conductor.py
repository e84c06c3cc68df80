"""What is decided between two epochs: whether they improve, the weights to keep, when to end."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from skcifar._jobs import TrainingJob, TrainingResult
from skcifar._optimization import LearningRates


class Conductor:
    """Watches the loss and the validation score, keeps the best weights, ends the training.

    The rules are those of scikit-learn's MLPClassifier.
    """

    def __init__(self, job: TrainingJob, rates: LearningRates) -> None:
        self.job = job
        self.rates = rates
        self.shown = job.module
        self.best_loss = math.inf
        self.best_score: float | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.epochs_without_improvement = 0
        self.converged = False
        self.history: list[dict] = []

    def act_for(self, job: TrainingJob) -> None:
        """Tell `job`'s callbacks and scorers, who look at its module, of the training."""
        for name in ("on_epoch_begin", "on_epoch_end", "validation_score"):
            setattr(self.job, name, getattr(job, name))
        self.shown = job.module.eval()

    def epoch_over(self, row: dict) -> bool:
        """Take note of an epoch and tell of it; says whether it was the last."""
        self._check_finite(row)
        if self.shown is not self.job.module:  # a training that pauses keeps its own to itself
            self.shown.load_state_dict(self.job.module.state_dict())
        if self.job.validation is not None:
            row["valid_score"] = self.validation_score(row)
        self.history.append(row)
        if self.job.verbose:
            score = f", validation score = {row['valid_score']:.6f}" if "valid_score" in row else ""
            print(f"Epoch {row['epoch']}, loss = {row['train_loss']:.8f}{score}")
        improved = self._improved(row)
        self.epochs_without_improvement = 0 if improved else self.epochs_without_improvement + 1
        # callbacks are told before the training ends, whatever ends it
        stop = self.job.on_epoch_end(row)
        patience = self.job.recipe.n_iter_no_change
        ends_early = self.job.recipe.early_stopping or not self.job.recipe.has_fixed_length
        if ends_early and self.epochs_without_improvement > patience:
            self.epochs_without_improvement = 0
            self.converged = not self.rates.lower()
        # rows that are only looked at do not decide on rates
        row = {**row, "valid_loss": row["train_loss"]} if self.job.only_watched else row
        self.rates.after_epoch(row)
        return stop or self.converged

    def validation_score(self, row: dict) -> float:
        if self.job.validation_score is not None:
            return float(self.job.validation_score())
        return -row["valid_loss"] if self.job.monitor_loss else row["valid_accuracy"]

    def _improved(self, row: dict) -> bool:
        """Whether the monitored figure beat its best by more than tol; keeps what is best."""
        recipe = self.job.recipe
        tol = 0.0 if recipe.has_fixed_length else recipe.tol
        loss_to_beat, self.best_loss = self.best_loss, min(self.best_loss, row["train_loss"])
        if not recipe.early_stopping:
            return row["train_loss"] <= loss_to_beat - tol
        score = row["valid_score"]
        score_to_beat = -math.inf if self.best_score is None else self.best_score
        if score > score_to_beat:
            self.best_score = score
            self.best_weights = {k: v.clone() for k, v in self.job.module.state_dict().items()}
        return score > score_to_beat if tol == 0 else score >= score_to_beat + tol

    def _check_finite(self, row: dict) -> None:
        if math.isfinite(row["train_loss"]):
            return
        recipe = self.job.recipe
        remedies = ["scale the inputs (normalize=True)", "lower learning_rate_init"]
        if recipe.clip_grad_norm is None and recipe.clip_grad_value is None:
            remedies.append("or clip gradients, as with clip_grad_value=1")
        else:
            remedies.append("or clip gradients to less")
        raise ValueError(
            f"The training loss became {row['train_loss']} in epoch {row['epoch']} at learning "
            f"rate {row['learning_rate']:g}: training diverged. Remedies: {', '.join(remedies)}."
        )

    def result(
        self, job: TrainingJob, optimizer_state: dict[int, dict], n_rows_seen: int, **others: Any
    ) -> TrainingResult:
        """What came of the training so far, the best weights in `job`'s module."""
        if self.best_weights is not None:
            job.module.load_state_dict(self.best_weights)
        elif job.module is not self.job.module:
            job.module.load_state_dict(self.job.module.state_dict())
        recipe = self.job.recipe
        state = {
            "solver": recipe.solver,
            "optimizer": optimizer_state,
            "rates": self.rates.state(),
            "generators": self.job.generators.get_state(),
        }
        expected_to_converge = not (recipe.has_fixed_length or self.job.incremental)
        ran_out = len(self.history) == recipe.max_iter and not self.converged
        return TrainingResult(
            history=list(self.history),
            best_score=self.best_score,
            state=state,
            n_rows_seen=n_rows_seen,
            ran_out=expected_to_converge and ran_out,
            **others,
        )
