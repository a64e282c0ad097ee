"""What figures of cases share: what can be drawn, and the classes' colours."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch

from presentation.palette import GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW
from segmentation.errors import InputError
from segmentation.task import Case

CLASS_COLOURS = (ORANGE, SKY, PURPLE, GREEN, YELLOW, VERMILION)


def check_cases(cases: Sequence[Case], class_names: Sequence[str], dimensions: int) -> None:
    """Raise InputError, naming the culprit, for what could not be drawn."""
    if not cases:
        raise InputError("cases: nothing to draw")
    if not cases[0].predictions:
        raise InputError(f"case {cases[0].name!r}: no method to draw")
    if len(class_names) > len(CLASS_COLOURS):
        raise InputError(f"class_names: {len(class_names)} given, at most {len(CLASS_COLOURS)} can be told apart")
    for case in cases:
        if list(case.predictions) != list(cases[0].predictions):
            raise InputError(f"case {case.name!r}: its methods differ from those of the first case")
        shape = case.reference.shape
        arrays = [case.reference, *(array for pair in case.predictions.values() for array in pair)]
        fits = case.image.shape[:dimensions] == shape and all(array.shape == shape for array in arrays)
        if len(shape) != dimensions or case.image.size == 0 or not fits:
            raise InputError(f"case {case.name!r}: image, labels and entropy must share one {dimensions}D shape")
        labels = [case.reference, *(labels for labels, _ in case.predictions.values())]
        if max(array.max() for array in labels) > len(class_names):
            raise InputError(f"case {case.name!r}: a label is above {len(class_names)}, the number of class names")


def patches(class_names: Sequence[str]) -> list[Patch]:
    """A legend's entries, in the colours of `draw_labels`."""
    return [
        Patch(facecolor=to_rgba(colour, 0.5), edgecolor=colour, label=name)
        for colour, name in zip(CLASS_COLOURS, class_names, strict=False)
    ]


def draw_labels(axes: Axes, labels: np.ndarray) -> None:
    """Each class as a translucent fill with a contour."""
    fills = np.array([(0.0, 0.0, 0.0, 0.0), *(to_rgba(colour, 0.4) for colour in CLASS_COLOURS)])
    axes.imshow(fills[labels], interpolation="nearest")
    for index, colour in enumerate(CLASS_COLOURS, start=1):
        mask = labels == index
        if mask.any() and not mask.all():  # matplotlib before 3.11 warns where there is no contour
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1)
