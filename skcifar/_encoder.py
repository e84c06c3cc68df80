"""What transformers of images do: the flat outputs of a network as features."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_is_fitted

from skcifar._base import TorchEstimator
from skcifar._stored_rows import Rows

_ROWS_WRITTEN_AT_ONCE = 8192


class TorchEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TorchEstimator):
    """A transformer whose module is an `Encoder`, and gives `_n_features_out` features."""

    _convolutional = True

    __metadata_request__transform = {"out": UNUSED}

    def transform(self, X: Any, *, out: np.ndarray | None = None) -> np.ndarray:
        """Return the features of images.

        Parameters
        ----------
        X : array-like or tensor, as for fit
            Images.
        out : ndarray of shape (n_samples, n_features_out), default=None
            Where the features go, such as a memory-mapped file for those of millions of images.

        Returns
        -------
        features : ndarray of shape (n_samples, n_features_out)
            Float64 for float64 images, else float32; or `out`.

        Raises
        ------
        ValueError
            When the images are not of the form of those of fit, or `out` cannot hold the features.
        """
        check_is_fitted(self)
        rows, _, _ = self._validate_rows(X, reset=False)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        if out is None:
            return self._features(rows, dtype)
        shape = (len(rows), self._n_features_out)
        if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype.kind != "f":
            given = f"an array of {out.dtype}, {out.shape}" if isinstance(out, np.ndarray) else out
            raise ValueError(f"out is {given}; expected an array of floats of shape {shape}.")
        for start in range(0, len(rows), _ROWS_WRITTEN_AT_ONCE):
            part = slice(start, start + _ROWS_WRITTEN_AT_ONCE)
            out[part] = self._features(rows[part], dtype)
        return out

    def _features(self, rows: Rows, dtype: torch.dtype) -> np.ndarray:
        return self._outputs_of(rows, dtype)

    def _with_weights_of(self, trained: Any) -> Self:
        """This encoder with the weights, precision and device of a trained `FineTunedNetwork`."""
        attributes = {name: getattr(trained, name) for name in ("dtype_", "device_")}
        return self._view(attributes | {"module_": trained.module_.encoder})

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
