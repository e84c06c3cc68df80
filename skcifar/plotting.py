"""Pictures of data, training and results, as scikit-learn's Displays.

A Display is made by a class method (`from_estimator`, `from_predictions`, `from_histories`, …),
which draws it; ``plot(ax=…)`` draws it again elsewhere, and every artist is an attribute whose name
ends with an underscore. They read public and fitted attributes only, so they serve any
scikit-learn estimator that has these. They want matplotlib: ``pip install 'skcifar[plot]'``.

What scikit-learn draws well is not here: confusion matrices are
:class:`sklearn.metrics.ConfusionMatrixDisplay`, and scores against the number of training rows are
:class:`sklearn.model_selection.LearningCurveDisplay`, which takes the results of
:func:`sklearn.model_selection.learning_curve` as they are.
"""

from skcifar._curve_displays import (
    ClassAccuracyDisplay,
    ClassCountsDisplay,
    LearningCurvesDisplay,
)
from skcifar._embedding_display import EmbeddingDisplay
from skcifar._image_displays import ImageGridDisplay, WeightImagesDisplay
from skcifar._sweep_displays import ParallelCoordinatesDisplay, SweepHeatMapDisplay

__all__ = [
    "ClassAccuracyDisplay",
    "ClassCountsDisplay",
    "EmbeddingDisplay",
    "ImageGridDisplay",
    "LearningCurvesDisplay",
    "ParallelCoordinatesDisplay",
    "SweepHeatMapDisplay",
    "WeightImagesDisplay",
]

for _name in __all__:  # where users find them, and where the tests of docstrings look for them
    globals()[_name].__module__ = __name__
