"""What nnU-Net finds here by name: `nnUNet_extTrainer` points at this folder, all of whose modules it imports."""

from gap_nnunet.fixmatch import FixMatchTrainer, GapMatchTrainer
from gap_nnunet.mean_teacher import MeanTeacherGAPTrainer, MeanTeacherTrainer
from gap_nnunet.unimatch import UniMatchGAPTrainer, UniMatchTrainer

__all__ = [
    "FixMatchTrainer",
    "GapMatchTrainer",
    "MeanTeacherGAPTrainer",
    "MeanTeacherTrainer",
    "UniMatchGAPTrainer",
    "UniMatchTrainer",
]
