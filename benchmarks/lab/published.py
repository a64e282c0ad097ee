"""What the GapMatch paper prints (Huang et al., AAAI 2025): Dice in percent and ASD in voxels on the test volumes."""

from segmentation.acdc import ACDC
from segmentation.la import LA
from segmentation.recipe import Run
from segmentation.task import Scores, Task

FULLY_SUPERVISED: dict[str, Scores] = {task.name: task.published[100]["Supervised"] for task in (ACDC, LA)}
"""Table 1, row FS."""


def _table_1(task: Task) -> dict[Run, dict[int, Scores]]:
    """Its rows LS and GapMatch; it has none for FixMatch alone."""
    rows: dict[str, Run] = {"Supervised": ("supervised", False), "GapMatch": ("fixmatch", True)}
    return {method: {share: task.published[share][row] for share in (1, 5, 10)} for row, method in rows.items()}


PUBLISHED: dict[str, dict[Run, dict[int, Scores]]] = {
    "ACDC": {
        **_table_1(ACDC),
        # table 1's further systems; whose runs these are: docs/methods.md
        ("dan", False): {1: (48.9, 17.5), 5: (56.4, 15.1), 10: (76.5, 3.01)},
        ("dtc", False): {1: (51.7, 17.5), 5: (56.9, 7.59), 10: (84.3, 4.04)},
        ("dct", False): {1: (49.7, 16.4), 5: (58.5, 10.8), 10: (78.1, 2.64)},
        ("uamt", False): {1: (36.9, 15.2), 5: (48.3, 9.14), 10: (81.8, 4.04)},
        ("sassnet", False): {1: (42.6, 24.8), 5: (57.8, 6.36), 10: (84.7, 1.83)},
        ("cps", False): {1: (51.5, 15.3), 5: (61.0, 2.92), 10: (78.8, 3.41)},
        ("mcnet", False): {1: (53.4, 17.1), 5: (62.8, 2.59), 10: (86.5, 1.89)},
        ("bcp", False): {1: (78.6, 1.73), 5: (87.6, 0.67), 10: (88.4, 1.17)},
        # table 2
        ("em", False): {1: (23.7, 36.4), 5: (56.1, 5.52), 10: (84.9, 2.90)},
        ("em", True): {1: (37.6, 17.7), 5: (75.0, 0.82), 10: (88.1, 1.23)},
        ("pseudo_label", False): {1: (45.5, 6.97), 5: (64.4, 4.05), 10: (86.8, 1.66)},
        ("pseudo_label", True): {1: (70.9, 1.21), 5: (84.8, 1.99), 10: (89.1, 0.62)},
        ("ict", False): {1: (31.7, 29.0), 5: (58.7, 4.71), 10: (84.7, 2.23)},
        ("ict", True): {1: (75.8, 2.18), 5: (85.2, 1.10), 10: (88.1, 1.08)},
        ("mixup", False): {1: (33.4, 26.6), 5: (59.4, 2.66), 10: (84.4, 2.84)},
        ("mixup", True): {1: (76.4, 2.30), 5: (85.0, 1.76), 10: (88.0, 1.00)},
        ("cutmix", False): {1: (42.8, 16.7), 5: (57.5, 7.86), 10: (84.5, 1.94)},
        ("cutmix", True): {1: (58.9, 7.24), 5: (74.4, 1.32), 10: (87.4, 1.01)},
        ("vat", False): {1: (54.2, 2.99), 5: (70.3, 2.52), 10: (86.5, 1.12)},
        ("vat", True): {1: (61.8, 3.10), 5: (75.5, 0.61), 10: (88.0, 0.91)},
        # table 3; its rows LS and ICT are those of tables 1 and 2
        ("mean_teacher", False): {1: (27.5, 39.3), 5: (57.7, 11.4), 10: (82.9, 3.26)},
        ("urpc", False): {1: (26.5, 14.4), 5: (50.3, 5.84), 10: (85.1, 1.39)},
        ("cct", False): {1: (25.3, 23.2), 5: (62.0, 3.25), 10: (87.6, 1.38)},
    },
    "LA": _table_1(LA),
}
