"""Warnings name the user's line, also where the user's folder is called much like the library's."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

import gap_torch


@pytest.mark.parametrize("library", [gap_torch, torch], ids=["gap_torch", "torch"])
def test_a_neighbour_of_a_library_is_the_users(library: ModuleType) -> None:
    script = f"{Path(library.__file__).parent}_runs/train.py"
    code = compile("from gap_torch.warning import warn\nwarn('told')", script, "exec")
    with pytest.warns(UserWarning, match="told") as warned:
        exec(code, {})
    assert [w.filename for w in warned] == [script]
