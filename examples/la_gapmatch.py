"""GapMatch on late-gadolinium MRI of the left atrium (LA): the paper's experiment in 3D.

    python examples/la_gapmatch.py                            a phantom, with and without GAP, in about 3 minutes
    python examples/la_gapmatch.py --data DIR --labeled 5     LA, GapMatch, 5 % of the labels
    torchrun --nproc-per-node 2 examples/la_gapmatch.py ...   the same, the batches shared out to two processes

DIR holds LA in the community's h5 layout (`segmentation.convert_la` makes it from the challenge's NRRD files).
"""

import sys
from collections.abc import Sequence

from segmentation import cli
from segmentation.atrium import write_atrium
from segmentation.recipe import REDUCED
from segmentation.volumewise import VolumeTask

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


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(LA, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
