"""Searches whose fits are trained together, with a plan, a journal and a look at the seeds.

scikit-learn's own `fit` runs under the joblib backend; what a search wants to know of its tasks
beyond what they return, it learns as their `Study` (`skcifar._study`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from joblib import parallel_config
from sklearn.base import BaseEstimator, clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, RandomizedSearchCV

from skcifar._backend import Backend, collect
from skcifar._comparison import comparison
from skcifar._dask import backend_of
from skcifar._jobs import MEETING
from skcifar._plan import plan_of
from skcifar._rounds import Split
from skcifar._search_parameters import CONSTRAINTS, documented
from skcifar._study import SearchStudy, owner_of
from skcifar._supervised import SupervisedEstimator


class _BatchedSearch(BaseEstimator):
    """What the three searches add to scikit-learn's."""

    _parameter_constraints: dict
    _study: SearchStudy

    def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Fit all candidates on all splits, together, and the best on all of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Training rows.
        y : array-like of shape (n_samples,), default=None
            Their labels.
        **params : dict of str to object
            Parameters of the estimator's ``fit``, of the scorers and of the splitter, as in
            scikit-learn: ``sample_weight``, ``groups``, ….

        Returns
        -------
        self : object
            The fitted search.

        Raises
        ------
        ValueError
            If `journal` is a damaged file or belongs to another search, and for what
            scikit-learn's own ``fit`` raises it.
        RuntimeError
            If another running search uses the same journal. With ``backend="dask"`` if there is no
            client or no worker, or the connection to the scheduler is lost.
        TypeError
            If a score cannot be written to the journal, or a task cannot be sent to a worker.
        ImportError
            If ``backend="dask"`` and dask is not installed.
        """
        self.__dict__.pop("partial_results_", None)
        study = self._study = SearchStudy(self, X, y, params)
        # A search within a task of another has a study of its own: its fits meet by themselves.
        token = MEETING.set(None)
        try:
            if Backend().effective_n_jobs(1) == 1:
                study.needs_to_be_told()
            with (
                backend_of(study) as backend,
                study,
                self._settings(),
                parallel_config(backend=backend),
            ):
                super().fit(X, y, **params)
        except BaseException:
            if study.rounds:
                self.partial_results_ = study.partial_results()
            raise
        finally:
            MEETING.reset(token)
            del self._study
        self.epoch_results_ = study.epoch_results()
        return self

    def plan(self, X: Any, y: Any = None, **params: Any) -> pd.DataFrame:
        """Say what `fit` would train together, and about how long that would take.

        Nothing is trained but a few batches of each group, in about a second.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Training rows.
        y : array-like of shape (n_samples,), default=None
            Their labels.
        **params : dict of str to object
            As in `fit`.

        Returns
        -------
        table : pandas.DataFrame
            A row for each group of fits that are trained as one, or one after the other for the
            same reason: ``group``, ``models``, ``estimator``, ``widths`` of the layers,
            ``batch_size``, ``epochs``, ``bytes`` (estimate of the memory of its rows, weights and
            activations), ``seconds`` (estimate of the training if none ends early; scoring and
            other estimators' fits come on top) and ``reason`` (why its fits are not trained as one;
            else missing).
            ``table.attrs["total_seconds"]`` and ``table.attrs["total_bytes"]``, the latter of the
            largest group. Of an estimator that trains several networks one after the other the
            first is seen; later rounds of a halving search are estimated from the first.
        """
        if Backend().effective_n_jobs(1) == 1:
            raise RuntimeError(
                "A plan needs the joblib backend 'skcifar', which does not work with this joblib; "
                "install one that skcifar was tested with."
            )
        search = clone(self).set_params(journal=None, progress=None, verbose=0)
        study = search._study = SearchStudy(search, X, y, params)

        def run() -> None:
            with search._settings():
                super(_BatchedSearch, search).fit(X, y, **params)

        fits = collect(run, study)
        return plan_of(study, fits)

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """What is set otherwise while scikit-learn's fit runs."""
        yield

    def _horizon(self) -> int | None:
        """Epochs that all fits are planned for, where their number is the resource."""
        return None

    def _rounds_after(self, n_candidates: int) -> list[tuple[int, int]]:
        """Candidates and resources of each further round of a search, after the first."""
        return []

    def _run_search(
        self, evaluate_candidates: Callable[..., dict], *, callback_ctx: Any = None
    ) -> None:
        """scikit-learn's extension point: all candidates are evaluated through here."""
        study = self._study
        self.n_splits_ *= self.n_repeats

        def evaluate(
            candidate_params: Any, cv: Any = None, more_results: dict | None = None, **others: Any
        ) -> dict:
            splits = _RepeatedSplits(cv or self._checked_cv_orig, self.n_repeats, study.start)
            candidates = study.open_round(list(candidate_params), more_results)
            try:
                results = evaluate_candidates(candidates, splits, more_results, **others)
            finally:
                current = study.close_round()
            if study.progress_error is not None:
                raise study.progress_error
            if not study.was_told_of(current):
                study.needs_to_be_told()
            results.update(comparison(results, current.splits, self.n_repeats))
            return results

        super()._run_search(evaluate, callback_ctx=callback_ctx)


class _RepeatedSplits:
    """The splits of another splitter, several times over; tells of them when they are made."""

    def __init__(self, cv: Any, n_repeats: int, tell: Callable[[list[Split]], None]) -> None:
        self.cv = cv
        self.n_repeats = n_repeats
        self.tell = tell

    def split(self, X: Any, y: Any = None, **params: Any) -> list[Split]:
        splits = list(self.cv.split(X, y, **params))
        self.tell(splits)
        return splits * self.n_repeats


# -- the searches ----------------------------------------------------------------------------------


@documented
class BatchedGridSearchCV(_BatchedSearch, GridSearchCV):
    """Search a grid of parameters, all fits of one architecture trained as one program.

    Parameters
    ----------
    {parameters}

    Attributes
    ----------
    {attributes}

    Notes
    -----
    {notes}

    References
    ----------
    {references}

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skcifar import MLPClassifier
    >>> from skcifar.model_selection import BatchedGridSearchCV
    >>> X, y = load_digits(return_X_y=True)
    >>> search = BatchedGridSearchCV(
    ...     MLPClassifier((16,), max_iter=4, random_state=0),
    ...     {"learning_rate_init": [0.3, 0.1, 0.0001]},
    ...     cv=3,
    ...     validate_epochs=True,
    ... )
    >>> int(search.plan(X, y)["models"].sum())
    9
    >>> search.fit(X, y).best_params_
    {'learning_rate_init': 0.1}
    >>> curves = search.epoch_results_.pivot_table("valid_score", "epoch", "candidate")
    >>> curves.shape
    (4, 3)
    """

    _parameter_constraints: dict = {**GridSearchCV._parameter_constraints, **CONSTRAINTS}

    def __init__(
        self,
        estimator: Any,
        param_grid: Any,
        *,
        scoring: Any = None,
        n_jobs: int | None = None,
        refit: Any = True,
        cv: Any = None,
        verbose: int = 0,
        pre_dispatch: int | str = "2*n_jobs",
        error_score: Any = np.nan,
        return_train_score: bool = False,
        journal: str | os.PathLike[str] | None = None,
        n_repeats: int = 1,
        validate_epochs: bool = False,
        progress: Callable[[dict], Any] | None = None,
        backend: str = "skcifar",
    ) -> None:
        super().__init__(
            estimator,
            param_grid,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.journal = journal
        self.n_repeats = n_repeats
        self.validate_epochs = validate_epochs
        self.progress = progress
        self.backend = backend


@documented
class BatchedRandomizedSearchCV(_BatchedSearch, RandomizedSearchCV):
    """Search parameters drawn at random, all fits of one architecture trained as one program.

    Parameters
    ----------
    {parameters}

    Attributes
    ----------
    {attributes}

    Notes
    -----
    {notes}

    References
    ----------
    {references}

    Examples
    --------
    >>> from scipy.stats import loguniform
    >>> from sklearn.datasets import load_digits
    >>> from skcifar import SoftmaxRegression
    >>> from skcifar.model_selection import BatchedRandomizedSearchCV
    >>> X, y = load_digits(return_X_y=True)
    >>> search = BatchedRandomizedSearchCV(
    ...     SoftmaxRegression(solver="sgd", max_iter=2, random_state=0),
    ...     {"learning_rate_init": loguniform(1e-3, 1), "momentum": [0.5, 0.9]},
    ...     n_iter=4,
    ...     cv=3,
    ...     random_state=0,
    ... )
    >>> len(search.fit(X, y).cv_results_["params"])
    4
    """

    _parameter_constraints: dict = {**RandomizedSearchCV._parameter_constraints, **CONSTRAINTS}

    def __init__(
        self,
        estimator: Any,
        param_distributions: Any,
        *,
        n_iter: int = 10,
        scoring: Any = None,
        n_jobs: int | None = None,
        refit: Any = True,
        cv: Any = None,
        verbose: int = 0,
        pre_dispatch: int | str = "2*n_jobs",
        random_state: Any = None,
        error_score: Any = np.nan,
        return_train_score: bool = False,
        journal: str | os.PathLike[str] | None = None,
        n_repeats: int = 1,
        validate_epochs: bool = False,
        progress: Callable[[dict], Any] | None = None,
        backend: str = "skcifar",
    ) -> None:
        super().__init__(
            estimator,
            param_distributions,
            n_iter=n_iter,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            random_state=random_state,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.journal = journal
        self.n_repeats = n_repeats
        self.validate_epochs = validate_epochs
        self.progress = progress
        self.backend = backend


@documented
class BatchedHalvingSearchCV(_BatchedSearch, HalvingGridSearchCV):
    """Search a grid by successive halving over epochs, the survivors' trainings going on.

    All candidates are trained for a few epochs; the best 1 / `factor` of them go on from where
    they are, until one round is left.

    Parameters
    ----------
    {parameters}

    Attributes
    ----------
    {attributes}
    n_resources_, n_candidates_ : list of int
        Resource and candidates of each round.
    n_iterations_, n_possible_iterations_, n_required_iterations_, n_remaining_candidates_ : int
        As scikit-learn's.
    min_resources_, max_resources_ : int
        Resource of the first round, and the most there is.

    Notes
    -----
    A candidate is an estimator with ``max_iter=max_resources``, paused after the epochs of each
    round: schedules of fixed length are planned for `max_resources` epochs throughout, so that
    the result of a survivor equals that of training it without a pause, and the best one is
    refitted with so many. ``cv_results_["n_resources"]`` are the epochs after which a candidate was
    scored. As in scikit-learn these reach `max_resources` in the last round only if that is the
    first round's times a power of `factor`. ``epoch_results_`` has a survivor's epochs from the
    first on in each round. This needs an estimator with one network to train, at the
    end of a Pipeline or by itself; elsewhere each round trains anew, as in scikit-learn. Fits taken
    from a journal have nothing to go on from: such survivors are trained from the start up to
    their next pause, with the same result. Candidates are compared with the best of their round.

    {notes}

    References
    ----------
    {references}

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skcifar import MLPClassifier
    >>> from skcifar.model_selection import BatchedHalvingSearchCV
    >>> X, y = load_digits(return_X_y=True)
    >>> search = BatchedHalvingSearchCV(
    ...     MLPClassifier((16,), max_iter=9, random_state=0),
    ...     {"learning_rate_init": [1.0, 0.3, 0.1, 0.03, 0.001], "alpha": [0, 0.01]},
    ...     cv=3,
    ... ).fit(X, y)
    >>> search.n_candidates_, search.n_resources_
    ([10, 4, 2], [1, 3, 9])
    >>> search.best_estimator_.n_iter_
    9
    """

    _parameter_constraints: dict = {**HalvingGridSearchCV._parameter_constraints, **CONSTRAINTS}
    max_resources: Any

    def __init__(
        self,
        estimator: Any,
        param_grid: Any,
        *,
        factor: float = 3,
        resource: str = "max_iter",
        max_resources: int | str = "auto",
        min_resources: int | str = "exhaust",
        aggressive_elimination: bool = False,
        cv: Any = 5,
        scoring: Any = None,
        refit: Any = True,
        error_score: Any = np.nan,
        return_train_score: bool = True,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
        journal: str | os.PathLike[str] | None = None,
        n_repeats: int = 1,
        validate_epochs: bool = False,
        progress: Callable[[dict], Any] | None = None,
        backend: str = "skcifar",
    ) -> None:
        super().__init__(
            estimator,
            param_grid,
            factor=factor,
            resource=resource,
            max_resources=max_resources,
            min_resources=min_resources,
            aggressive_elimination=aggressive_elimination,
            cv=cv,
            scoring=scoring,
            refit=refit,
            error_score=error_score,
            return_train_score=return_train_score,
            random_state=random_state,
            n_jobs=n_jobs,
            verbose=verbose,
        )
        self.journal = journal
        self.n_repeats = n_repeats
        self.validate_epochs = validate_epochs
        self.progress = progress
        self.backend = backend

    @contextmanager
    def _settings(self) -> Iterator[None]:
        # scikit-learn takes "auto" for the number of rows only
        given = self.max_resources
        if given == "auto" and self.resource != "n_samples":
            self.max_resources = _own_resource(self.estimator, self.resource)
        try:
            yield
        finally:
            self.max_resources = given

    def _horizon(self) -> int | None:
        return self.max_resources_

    def _rounds_after(self, n_candidates: int) -> list[tuple[int, int]]:
        # scikit-learn's arithmetic
        factor, least, most = self.factor, self.min_resources_, self.max_resources_
        n_required = 1 + math.floor(math.log(n_candidates, factor))
        n_possible = 1 + math.floor(math.log(most // least, factor))
        n_rounds = n_required if self.aggressive_elimination else min(n_required, n_possible)
        repeated = max(0, n_rounds - n_possible)
        rounds = []
        for number in range(1, n_rounds):
            n_candidates = math.ceil(n_candidates / factor)
            n_resources = int(factor ** max(0, number - repeated) * least)
            rounds.append((n_candidates, min(n_resources, most)))
        return rounds


def _own_resource(estimator: Any, resource: str) -> Any:
    """The estimator's own value of a resource; scikit-learn says what is wrong with others."""
    owner, name = owner_of(estimator, resource)
    if name == "max_iter" and isinstance(owner, SupervisedEstimator):
        return owner._resolve_max_iter()
    value = estimator.get_params().get(resource)
    return int(value) if isinstance(value, int | np.integer) and value > 0 else "auto"
