"""The command `gap-nnunet`: prepare, train, path."""

import argparse
import sys
from collections.abc import Sequence

from .finding import FOLDER, make_visible
from .problems import Problems

TRAIN = "what follows goes to nnUNetv2_train as it is, which can see our trainers: 5 2d 0 -tr GapMatchTrainer"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 and one message for what the user can put right; everything else is a traceback."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["train"]:
            _train(arguments[1:])
        else:
            _other(_parser().parse_args(arguments))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in ("nnunetv2", "batchgenerators", "batchgeneratorsv2"):
            raise
        print(f'error: {package} is not installed: pip install "gap-torch[nnunet]"', file=sys.stderr)
        return 1
    except ValueError as error:
        if arguments[:1] == ["train"] and not isinstance(error, Problems):  # of nnU-Net, with a traceback that helps
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gap-nnunet", description="nnU-Net v2 with a folder of unlabelled scans.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="nnU-Net's plan and preprocessing, then imagesUn by the same plan")
    prepare.add_argument("-d", required=True, help="dataset, number or name", metavar="DATASET")
    prepare.add_argument("-c", nargs="+", default=["2d", "3d_fullres"], help="configurations (2d 3d_fullres)")
    prepare.add_argument("-np", type=int, help="processes (nnU-Net's own: 8, 4 for 3d_fullres)")
    prepare.add_argument("-pl", help="nnU-Net's planner (the one that made the plans, or ExperimentPlanner)")
    prepare.add_argument("-p", help="name of the plans (the planner's own)")
    prepare.add_argument("--verify_dataset_integrity", action="store_true", help="let nnU-Net look at labelled cases")
    prepare.add_argument("--clean", action="store_true", help="do all anew, what is there too")
    commands.add_parser("train", help=TRAIN, add_help=False)
    commands.add_parser("path", help="the folder for nnUNet_extTrainer, which nnU-Net reads since 2.8")
    return parser


def _other(options: argparse.Namespace) -> None:
    if options.command == "path":
        print(FOLDER)
        return
    from .prepare import prepare

    prepare(options.d, options.c, options.pl, options.p, options.np, options.verify_dataset_integrity, options.clean)


def _train(arguments: list[str]) -> None:
    make_visible()
    from nnunetv2.run.run_training import run_training_entry

    sys.argv = ["gap-nnunet train", *arguments]
    run_training_entry()


if __name__ == "__main__":
    sys.exit(main())
