"""What transformers of images do: the flat outputs of a network as features."""

from __future__ import annotations

from collections.abc import Callable
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
            Float64 for float64 images, else float32; or `out`, unless `set_output` asks for a
            DataFrame of it.

        Raises
        ------
        ValueError
            When the images are not of the form of those of fit, or `out` cannot hold the features.
        """
        check_is_fitted(self)
        rows, _, _ = self._validate_rows(X, reset=False)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        if out is not None:
            _check_writable(out, (len(rows), self._n_features_out))
        return self._features(rows, dtype, out)

    def _features(
        self, rows: Rows, dtype: torch.dtype, out: np.ndarray | None = None
    ) -> np.ndarray:
        return into(out, rows, lambda part: self._outputs_of(part, dtype))

    def _with_weights_of(self, trained: Any) -> Self:
        """This encoder with the weights, precision and device of a trained `FineTunedNetwork`."""
        attributes = {name: getattr(trained, name) for name in ("dtype_", "device_")}
        return self._view(attributes | {"module_": trained.module_.encoder})

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def into(out: np.ndarray | None, rows: Rows, compute: Callable[[Any], np.ndarray]) -> np.ndarray:
    """What is computed of the rows: of all at once, or in parts that go into `out`."""
    if out is None:
        return compute(rows)
    for start in range(0, len(rows), _ROWS_WRITTEN_AT_ONCE):
        part = slice(start, start + _ROWS_WRITTEN_AT_ONCE)
        out[part] = compute(rows[part])
    return out


def _check_writable(out: Any, shape: tuple[int, int]) -> None:
    given = type(out).__name__
    if isinstance(out, np.ndarray):
        given = f"{given} of {out.dtype} and shape {out.shape}"
        if not out.flags.writeable:
            given = f"a read-only {given}"
        elif out.shape == shape and out.dtype.kind == "f":
            return
    raise ValueError(f"out is {given}; expected a writable array of floats of shape {shape}.")
