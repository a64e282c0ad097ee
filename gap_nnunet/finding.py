"""How nnU-Net finds our trainers: by `nnUNet_extTrainer`, which it reads since 2.8; before, by our look into it."""

import importlib
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "trainers"
VARIABLE = "nnUNet_extTrainer"


def set_variable() -> None:
    """Our folder behind the user's own, whose trainers may derive from ours or go by the same name."""
    own = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    if str(FOLDER) not in own:
        os.environ[VARIABLE] = os.pathsep.join([*own, str(FOLDER)])


def make_visible() -> None:
    """Set the variable, for processes too that are started from here; and let an nnU-Net before 2.8 read it."""
    set_variable()
    from nnunetv2.run import run_training

    if not hasattr(run_training, "recursive_find_trainer_class_by_name"):
        _let_it_look(run_training)
        run_training.run_ddp = run_ddp


def _let_it_look(run_training: Any) -> None:
    nnunets = run_training.recursive_find_python_class

    def find(folder: str, class_name: str, current_module: str) -> type | None:
        return nnunets(folder, class_name, current_module) or _outside(class_name)

    run_training.recursive_find_python_class = find


def run_ddp(rank: int, *arguments: Any) -> None:
    """nnU-Net's own in a process of its own, which has none of the parent's changes."""
    from nnunetv2.run import run_training

    nnunets = run_training.run_ddp
    _let_it_look(run_training)
    nnunets(rank, *arguments)


def _outside(class_name: str) -> type | None:
    """The class of this name in a module of the variable's folders."""
    for folder in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        sys.path.insert(0, folder)
        try:
            for module in pkgutil.iter_modules([folder]):
                found = getattr(importlib.import_module(module.name), class_name, None)
                if found is not None:
                    return found
        finally:
            sys.path.remove(folder)
    return None
