"""The data set LA: its files, the paper's scores, and the recipes for it."""

from segmentation.data.phantoms.atrium import write_atrium
from segmentation.recipe import REDUCED
from segmentation.volume_task import VolumeTask

# Table 1 of the GapMatch paper (Huang et al., AAAI 2025), rows LS, FS (as 100 %) and GapMatch.
PUBLISHED = {
    1: {"Supervised": (40.0, 21.2), "GapMatch": (79.8, 3.06)},
    5: {"Supervised": (52.6, 9.87), "GapMatch": (88.3, 1.77)},
    10: {"Supervised": (82.7, 3.26), "GapMatch": (91.0, 1.46)},
    100: {"Supervised": (91.5, 1.51)},
}
SMALL_BATCH = {"labelled_batch": 2, "unlabelled_batch": 2}

LA = VolumeTask(
    name="LA",
    classes=("LA",),
    presets={
        "paper": {**SMALL_BATCH, "size": (112, 112, 80), "iterations": 15_000},
        "cpu": {
            **REDUCED,
            **SMALL_BATCH,
            "size": (80, 80, 48),
            "width": 8,
            "iterations": 600,
            "validate_every": 50,
        },
        "phantom": {
            **REDUCED,
            **SMALL_BATCH,
            "size": (48, 48, 32),
            "width": 8,
            "iterations": 300,
            "lr": 0.03,
            "tau": 0.8,
            "eps": 0.02,  # of 0.02, 0.05 and 0.1 the best on the phantom of another seed
            "validate_every": 50,
        },
    },
    training_list="train",
    validation_list=None,
    test_list="test",
    training_patients=80,
    published=PUBLISHED,
    write_phantom=write_atrium,
    stride=(18, 18, 4),
)
