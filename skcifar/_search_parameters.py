"""The parameters of the searches: the values of those that we add, the documentation of all."""

from __future__ import annotations

import inspect
import os
import re
from numbers import Integral
from typing import TypeVar

from sklearn.utils._param_validation import Interval, StrOptions

CONSTRAINTS: dict = {
    "journal": [str, os.PathLike, None],
    "n_repeats": [Interval(Integral, 1, None, closed="left")],
    "validate_epochs": ["boolean"],
    "progress": [callable, None],
    "backend": [StrOptions({"skcifar", "dask"})],
}

# In the order of no signature: a class takes those that it has.
_PARAMETERS = """\
estimator : estimator object
    Any; what gains are those of this package, as they are or in a Pipeline.
param_grid : dict or list of dicts
    Names of parameters and the values to try, in all combinations.
param_distributions : dict or list of dicts
    Names of parameters, and distributions with an ``rvs`` method or lists to draw from.
n_iter : int, default={default}
    Candidates to draw.
factor : int or float, default={default}
    Share of the candidates, 1 / `factor`, that goes on into the next round, with `factor` times
    the resource.
resource : str, default={default}
    What the candidates get more of in each round. Epochs, ``"max_iter"`` or of a Pipeline
    ``"<step>__max_iter"``, are counted along one training of `max_resources` epochs.
    ``"n_samples"`` and all other parameters, also those of other estimators, are as in
    scikit-learn, where each round trains anew.
max_resources : int or "auto", default={default}
    Most of the resource. "auto" is the estimator's own value of it, or the number of rows.
min_resources : int, "exhaust" or "smallest", default={default}
    Resource in the first round, as in scikit-learn: "smallest" is one epoch, "exhaust" so many
    that the last round has as many as possible.
aggressive_elimination : bool, default={default}
    Whether the first round is repeated until few enough candidates are left, where the resource
    does not suffice.
scoring : str, callable, list, tuple or dict, default={default}
    The metric or, but for halving, metrics; None is the estimator's own ``score``.
n_jobs : int, default={default}
    Accepted, and without effect: the fits are trained together, where `backend` has them trained.
refit : bool, str or callable, default={default}
    Whether to fit the best candidate to all of X; of several metrics the name of the one that
    decides; or a callable that takes `cv_results_`, with what is added to it here, and returns
    the row of the best.
cv : int, cross-validation generator or iterable, default={default}
    The splits; an integer is a number of folds, stratified for classifiers, and None is 5.
verbose : int, default={default}
    As in scikit-learn; 1 says how many fits there are.
pre_dispatch : int or str, default={default}
    Accepted, and without effect.
random_state : int, RandomState instance or None, default={default}
    Seed of what the search itself draws, candidates or the rows of ``resource="n_samples"``. With
    a journal it must be an int, or they are others each time.
error_score : "raise" or number, default={default}
    Score of a candidate whose fit or scoring fails, as one whose training diverges does.
return_train_score : bool, default={default}
    Whether to score the rows trained on, too.
journal : str or path-like, default={default}
    File to which each finished fit is written. A search that was ended, by whatever means, and is
    started again with the same journal repeats only what was in training.
n_repeats : int, default={default}
    Seeds for each candidate. The splits of `cv` are gone through so many times, the first time
    with the estimator's `random_state`, then with seeds derived from it. Estimators of other
    packages are not seeded anew.
validate_epochs : bool, default={default}
    Whether to score each fold's left-out rows after every epoch, for `epoch_results_`. They only
    watch the training; a fit with validation rows of its own keeps these.
progress : callable or None, default={default}
    Called whenever an epoch or a fit is over, with a dict: ``done_fits``, ``total_fits``,
    ``done_epochs``, ``expected_epochs``, ``best_score`` (highest mean test score of the candidates
    that are done, of a halving search in this round; else None) and ``seconds``. On a cluster it
    is called when groups of fits are over.
backend : {"skcifar", "dask"}, default={default}
    Where the fits are trained: "skcifar" in this process, "dask" on the workers of a Dask cluster,
    that of the current :class:`distributed.Client`. Each worker is sent groups of fits, which it
    trains together; see the Notes. The results are the same, and a journal that was begun in one
    place may be gone on with in the other."""

_ATTRIBUTES = """\
cv_results_ : dict of ndarrays
    As scikit-learn's, with its keys in its order, and then, for several metrics with ``_<metric>``
    in place of ``_score`` and at the end of the last:

    - ``seed_std_test_score``: standard deviation over the seeds (divisor k - 1) of the mean score
      over the folds; NaN with `n_repeats=1`.
    - ``indistinguishable_from_best``: whether the difference to the highest mean test score is
      within chance, see the Notes.
epoch_results_ : pandas.DataFrame
    A row for each epoch of each fit: ``candidate`` (row of `cv_results_`), ``fold``, ``repeat``,
    ``fit`` (0, but for estimators that train several networks), ``epoch`` (from 1),
    ``train_loss``, ``valid_score`` (NaN where a fit has no validation rows), and what else the
    history of the fit holds.
partial_results_ : pandas.DataFrame
    Only after a `fit` that was interrupted or failed: a row for each finished task, with
    ``candidate``, ``params``, ``fold``, ``repeat``, scores and times.
best_index_, best_params_, best_score_, best_estimator_, refit_time_, scorer_, n_splits_ : various
    As scikit-learn's; `n_splits_` counts the splits of all repeats.
classes_, n_features_in_, feature_names_in_ : various
    Those of `best_estimator_`."""

_NOTES = """\
Fits that share their architecture are trained as one; everything else, scorers and other
estimators included, runs one after the other as scikit-learn has it. The results are those of
{base} to rounding; ``fit_time`` is a fit's share of the time of its group.

The differences of two candidates' scores in k folds, means over the repeats, are compared by the
corrected resampled t-test of [1]_: their mean is within chance if it is at most the 0.975
quantile of Student's t with k - 1 degrees of freedom times
:math:`\\sqrt{(1/k + n_{test}/n_{train}) s^2}`. It allows neither for choosing the best after
seeing the scores nor for looking at many pairs. With a single split, nothing can be told apart.

With ``backend="dask"`` the fits of a fold are cut into groups, four for each worker on a CPU and
one for each on a GPU, or more if the smallest worker's free memory asks for it. X, y and all large
arrays are sent to each worker once; what is known of a fit comes back when its group is over; the
best candidate is refitted in this process. A worker that dies loses nothing but time: its group is
trained again elsewhere. If the connection to the scheduler is lost, a RuntimeError says so, and the
same call goes on from its journal. A worker trains one group at a time, with as many threads of
torch's as Dask gave it; ``device="auto"`` is its GPU, or what the environment variable
``SKCIFAR_DEVICE`` names there. The rounds of a halving search by epochs train the survivors from
their first epoch on, as networks stay where they are. Warnings of workers are given here, each
once. scikit-learn's callbacks reach this process from workers on the same machine only.

`validate_epochs` needs an estimator of this package itself: in a Pipeline, whose first steps change
the rows, ``valid_score`` stays NaN. It is the accuracy, or the negative loss with
``scoring="loss"``."""

_REFERENCES = """\
.. [1] C. Nadeau and Y. Bengio, "Inference for the Generalization Error", Machine Learning, 52,
   239-281, 2003."""

_Class = TypeVar("_Class", bound=type)


def documented(cls: _Class) -> _Class:
    """Fill the shared parts into a class's docstring; show it where users import it from."""
    assert cls.__doc__ is not None
    entries = {entry.split(" ")[0]: entry for entry in re.split(r"\n(?=\w)", _PARAMETERS)}
    parameters = [
        entries[name].replace("{default}", repr(parameter.default).replace("'", '"'))
        for name, parameter in inspect.signature(cls).parameters.items()
    ]
    base = f":class:`sklearn.model_selection.{cls.__mro__[2].__name__}`"
    for name, text in (
        ("parameters", "\n".join(parameters)),
        ("attributes", _ATTRIBUTES),
        ("notes", _NOTES.replace("{base}", base)),
        ("references", _REFERENCES),
    ):
        cls.__doc__ = cls.__doc__.replace("{" + name + "}", text.replace("\n", "\n    "))
    cls.__module__ = "skcifar.model_selection"
    return cls
