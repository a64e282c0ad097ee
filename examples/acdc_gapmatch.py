"""GapMatch on cardiac MRI (ACDC): the paper's main experiment.

    python examples/acdc_gapmatch.py                            a phantom, by three methods, in about 2 minutes
    python examples/acdc_gapmatch.py --data DIR --labelled 1     ACDC, GapMatch, 1 % of the labels
    torchrun --nproc-per-node 2 examples/acdc_gapmatch.py ...   the same, the batches shared out to two processes

DIR holds ACDC in the community's h5 layout (`segmentation.data.convert_acdc` makes it from the official download).
"""

import sys
from collections.abc import Sequence

from segmentation import cli
from segmentation.acdc import ACDC


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(ACDC, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
