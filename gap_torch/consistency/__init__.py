"""Consistency methods, each one `prepare` and one `loss`.

`prepare(model, batch)` runs once, at theta and without gradient: it makes the views and fixes their targets.
`loss(model, views)`, which is `compare` of the model's outputs for these views, may then be called any number of times,
at theta and at theta*.
"""

from .adversary import Adversary, Discriminator
from .alignment import alignment, hard_alignment
from .bcp import BCP, BCPPreTraining, linear_dice_loss
from .cct import CCT, MedicalCCT
from .cps import CPS
from .cutmix import CutMix
from .cutmix_seg import CutMixMeanTeacher, CutMixSeg
from .dan import DAN
from .dct import DCT
from .dct_views import ViewsDCT
from .distance_head import DistanceMethod
from .dtc import DTC
from .em import EntropyMinimisation
from .feature_perturbations import ChannelDropout, FeatureDrop, FeatureNoise, FeaturePerturbation
from .fixmatch import FixMatch
from .flexmatch import CurriculumThreshold
from .freematch import SelfAdaptiveThreshold
from .ict import ICT
from .mcnet import MCNet
from .mean_teacher import MeanTeacher
from .method import Batch, Method, Outputs, Views, auxiliary_logits, logits_of
from .mixup import MixUp
from .pseudo_label import PseudoLabel
from .sassnet import SASSNet
from .signed_distances import signed_distances
from .teacher import Teacher
from .thresholds import FixedThreshold, Threshold
from .twins import TwinMethod
from .uamt import UAMT
from .unimatch import UniMatch
from .urpc import URPC, MedicalURPC
from .vat import VAT, DiceVAT

__all__ = [
    "BCP",
    "CCT",
    "CPS",
    "DAN",
    "DCT",
    "DTC",
    "ICT",
    "UAMT",
    "URPC",
    "VAT",
    "Adversary",
    "BCPPreTraining",
    "Batch",
    "ChannelDropout",
    "CurriculumThreshold",
    "CutMix",
    "CutMixMeanTeacher",
    "CutMixSeg",
    "DiceVAT",
    "Discriminator",
    "DistanceMethod",
    "EntropyMinimisation",
    "FeatureDrop",
    "FeatureNoise",
    "FeaturePerturbation",
    "FixMatch",
    "FixedThreshold",
    "MCNet",
    "MeanTeacher",
    "MedicalCCT",
    "MedicalURPC",
    "Method",
    "MixUp",
    "Outputs",
    "PseudoLabel",
    "SASSNet",
    "SelfAdaptiveThreshold",
    "Teacher",
    "Threshold",
    "TwinMethod",
    "UniMatch",
    "Views",
    "ViewsDCT",
    "alignment",
    "auxiliary_logits",
    "hard_alignment",
    "linear_dice_loss",
    "logits_of",
    "signed_distances",
]
