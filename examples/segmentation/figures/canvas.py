"""What all figures share: their size and how they are written.

matplotlib without pyplot (no display, no global state), in a size that stays readable at the 900 pixels of a README.
"""

from pathlib import Path

from matplotlib.figure import Figure

from segmentation.errors import InputError

WIDTH = 9.0  # inches: at 100 dots per inch as wide as a README, so that font sizes hold
DPI = 200  # for dense screens


def save(figure: Figure, path: Path | str) -> None:
    """Write `figure`, making the folder. Raises InputError if it can't be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise InputError(f"{path}: cannot write ({error})") from None
