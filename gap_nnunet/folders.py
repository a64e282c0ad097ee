"""Where preprocessed scans without labels lie: in a folder of their own, for nnU-Net splits all that is in its own.

nnUNet_preprocessed/Dataset005_Heart/nnUNetPlans_2d/                  nnU-Net's, the labelled cases
nnUNet_preprocessed/Dataset005_Heart/nnUNetPlans_2d_unlabelled/       ours, in nnU-Net's format
nnUNet_preprocessed/Dataset005_Heart/nnUNetPlans_2d_unlabelled.json   what of the plan they were made by
"""

import json
import os
from pathlib import Path
from typing import Any

DECIDE = ("normalization", "preprocessor", "resampling", "spacing", "use_mask_for_norm")  # keys of a configuration


def of_environment(name: str) -> Path:
    """One of nnU-Net's folders.

    Raises:
        ValueError: the variable is not set.
    """
    folder = os.environ.get(name)
    if not folder:
        raise ValueError(f"the environment variable {name} is not set; nnU-Net needs it: export {name}=/a/folder")
    return Path(folder)


def unlabelled(labelled: str | Path) -> Path:
    """The folder beside nnU-Net's own of the same configuration."""
    labelled = Path(labelled)
    return labelled.with_name(f"{labelled.name}_unlabelled")


def cases(folder: Path) -> list[str]:
    """Identifiers of what is there completely: a case's .pkl comes last."""
    return sorted(path.stem for path in folder.glob("*.pkl"))


def recipe(plans: Any, configuration: Any) -> dict[str, Any]:
    """What decides how a scan is preprocessed, of a PlansManager and a ConfigurationManager, as JSON has it."""
    decides = {key: value for key, value in configuration.configuration.items() if key.startswith(DECIDE)}
    decides["transpose_forward"] = plans.transpose_forward
    decides["intensities"] = plans.foreground_intensity_properties_per_channel
    decides["reader"] = plans.plans["image_reader_writer"]
    return dict(json.loads(json.dumps(decides)))


def recipe_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def made_by(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` was made by this recipe."""
    file = recipe_file(folder)
    return file.is_file() and json.loads(file.read_text()) == recipe
