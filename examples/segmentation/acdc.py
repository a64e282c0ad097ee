"""The data set ACDC: its files, the paper's scores, and the recipes for it."""

from segmentation.data.phantoms.heart import write_phantom
from segmentation.recipe import AVERAGED, REDUCED
from segmentation.slice_task import SliceTask

# Table 1 of the GapMatch paper (Huang et al., AAAI 2025), rows LS, FS (as 100 %) and GapMatch. It prints no row for
# FixMatch alone.
PUBLISHED = {
    1: {"Supervised": (27.7, 32.6), "GapMatch": (86.8, 0.81)},
    5: {"Supervised": (56.6, 6.15), "GapMatch": (88.8, 0.64)},
    10: {"Supervised": (83.8, 2.84), "GapMatch": (90.1, 0.39)},
    100: {"Supervised": (91.5, 0.57)},
}

ACDC = SliceTask(
    name="ACDC",
    classes=("RV", "Myo", "LV"),
    presets={
        "paper": {},
        "cpu": {**REDUCED, "size": (128, 128), "iterations": 1_500, "validate_every": 100},
        "study": {
            **AVERAGED,
            "size": (64, 64),
            "iterations": 600,
            "warm_up": 200,  # else confident background wins before anything else is learnt (docs/acdc.md)
            "unlabelled_loss": "ce_dice",
            "ramp_up": 0.0,  # of all methods, as is the weight
            "weight": 0.5,  # with alpha = 1 g2 doubles it; FixMatch loses by as much (docs/acdc.md)
            "validate_every": 100,
        },
        # The paper's recipe but for tau, at a size where one core makes a run in minutes: enough runs for a comparison.
        "medium": {
            "size": (64, 64),
            "iterations": 3_000,
            "validate_every": 150,
            "blur": 64 / 256,
            "tau": 0.8,  # at 0.95 some runs lose classes, with GAP and without (docs/acdc.md)
        },
        # For many methods: each by its own weights.
        "short": {
            **AVERAGED,
            "size": (64, 64),
            "iterations": 600,
            "warm_up": 200,  # as in `study`
            "validate_every": 100,
            "blur": 64 / 256,
            "tau": 0.8,
        },
        "phantom": {
            **AVERAGED,
            "size": (64, 64),
            "width": 8,
            "iterations": 360,
            "warm_up": 120,
            "labelled_batch": 6,
            "unlabelled_batch": 6,
            "lr": 0.03,
            "blur": 64 / 256,
            "tau": 0.8,
            "unlabelled_loss": "ce_dice",
            "eps": 0.05,  # of 0.02, 0.05 and 0.1 the best on the validation volumes of an earlier phantom
            "average_decay": 0.95,
            "validate_every": 40,
        },
    },
    training_list="train_slices",
    validation_list="val",
    test_list="test",
    training_patients=70,
    published=PUBLISHED,
    write_phantom=write_phantom,
)
