"""What transformers of images do: the flat outputs of a network as features."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from skcifar._base import TorchEstimator


class TorchEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TorchEstimator):
    """A transformer whose module is an `Encoder`, and gives `_n_features_out` features."""

    _convolutional = True

    def transform(self, X: Any) -> np.ndarray:
        """Return the features of images.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.

        Returns
        -------
        features : ndarray of shape (n_samples, n_features_out)
            Float64 for float64 images, else float32.
        """
        check_is_fitted(self)
        rows, _, _ = self._validate_rows(X, reset=False)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return self._features(rows, dtype)

    def _features(self, rows: Tensor, dtype: torch.dtype) -> np.ndarray:
        return self._outputs_of(rows, dtype)

    def _with_weights_of(self, trained: Any) -> Self:
        """This encoder with the weights, precision and device of a trained `FineTunedNetwork`."""
        attributes = {name: getattr(trained, name) for name in ("dtype_", "device_")}
        return self._view(attributes | {"module_": trained.module_.encoder})

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
