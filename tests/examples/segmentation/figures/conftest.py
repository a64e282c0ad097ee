"""What the tests of all pictures look at."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch) -> "list[Figure]":
    """Every figure saved, as matplotlib objects."""
    from matplotlib.figure import Figure  # here, so that the collection ends well without it

    saved = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved
