"""GapMatch on late-gadolinium MRI of the left atrium (LA): the paper's experiment in 3D.

    python examples/la_gapmatch.py                            a phantom, by three methods, in about 4 minutes
    python examples/la_gapmatch.py --data DIR --labelled 5     LA, GapMatch, 5 % of the labels
    torchrun --nproc-per-node 2 examples/la_gapmatch.py ...   the same, the batches shared out to two processes

DIR holds LA in the community's h5 layout (`segmentation.data.convert_la` makes it from the challenge's NRRD files).
"""

import sys
from collections.abc import Sequence

from segmentation import cli
from segmentation.la import LA


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(LA, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
