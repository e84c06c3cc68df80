"""What every Display is made of: axes to draw in, names of classes, colours that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.legend import Legend

ClassNames = Sequence[str] | Mapping[Any, str] | None

WIDTH = 8.0  # inches: 800 pixels at matplotlib's 100 dots per inch, as wide as a README
# Colours that colour-blind eyes tell apart: of Okabe and Ito all but yellow, which white paper
# swallows, then the ten of Petroff (arXiv:2107.02270), with black for the second of his greys;
# more than ten run from dark to light.
FEW_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
TEN_COLOURS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"]
TEN_COLOURS += ["#a96b59", "#e76300", "#b9ac70", "#000000", "#92dadd"]


class Display:
    """What all Displays share: where they draw."""

    figure_: Figure | SubFigure
    ax_: Axes

    @classmethod
    def _pyplot(cls) -> ModuleType:
        try:
            import matplotlib.pyplot as plt
        except Exception as error:  # one that is there but broken may raise anything
            raise ImportError(
                f"{cls.__name__} draws with matplotlib, which cannot be imported ({error}): "
                f"pip install 'skcifar[plot]'"
            ) from error
        return plt

    def _open(self, ax: Axes | None, width: float, height: float) -> Axes:
        """Set `ax_` and `figure_`: those given, or a new figure of so many inches."""
        plt = self._pyplot()
        if ax is None:
            _, ax = plt.subplots(figsize=(width, height), layout="constrained")
        scale = getattr(self, "colorbar_", None)
        if scale is not None and ax is self.ax_:  # drawn again in the same axes
            scale.remove()
        self.ax_ = ax
        self.figure_ = ax.figure
        return ax


def names_of(labels: ArrayLike, class_names: ClassNames) -> dict[Any, str]:
    """The name of each label: from a mapping, a sequence that whole numbers index, or itself."""
    values = np.asarray(labels)
    if class_names is None:
        return {label: str(label) for label in values}
    if isinstance(class_names, Mapping):
        missing = [label for label in values.tolist() if label not in class_names]
        if not missing:
            return {label: str(class_names[label]) for label in values}
        given = f"no name for {missing}"
    else:
        if values.dtype.kind in "iub" and values.min() >= 0 and values.max() < len(class_names):
            return {label: str(class_names[int(label)]) for label in values}
        given = f"{len(class_names)} names for the labels {values.tolist()}"
    raise ValueError(
        f"class_names has {given}; expected a mapping with a name for each label, or a sequence "
        f"in which label 0 has the first name, label 1 the second, and so on."
    )


def named_legend(
    owner: Axes | Figure | SubFigure, names: Sequence[str], artists: Sequence[Any], **style: Any
) -> Legend:
    """A legend that writes any name as it is: dollars, an underscore in front, and twice, too."""
    labels = [str(i) for i in range(len(artists))]
    legend = owner.legend(handles=list(artists), labels=labels, **style)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)
    return legend


def colours_for(n: int) -> list[Any]:
    """As many colours, told apart by everyone where they are at most ten."""
    for colours in (FEW_COLOURS, TEN_COLOURS):
        if n <= len(colours):
            return colours[:n]
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.95, n)))
