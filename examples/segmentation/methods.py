"""The methods that a run can have, one table: names, labels, how each is built, what it needs and what it costs.

A builder's keyword arguments are the method's own options, which the command line sets by name. Nothing else in the
examples asks which method runs.
"""

import inspect
import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from gap_torch.consistency import (
    BCP,
    CCT,
    CPS,
    DAN,
    DCT,
    DTC,
    ICT,
    UAMT,
    URPC,
    VAT,
    Adversary,
    BCPPreTraining,
    CurriculumThreshold,
    CutMix,
    CutMixMeanTeacher,
    CutMixSeg,
    DiceVAT,
    Discriminator,
    EntropyMinimisation,
    FixMatch,
    MCNet,
    MeanTeacher,
    MedicalCCT,
    MedicalURPC,
    Method,
    MixUp,
    PseudoLabel,
    SASSNet,
    SelfAdaptiveThreshold,
    Teacher,
    Threshold,
    UniMatch,
    ViewsDCT,
    linear_dice_loss,
)
from gap_torch.consistency.method import Augmentation
from gap_torch.consistency.targets import Mode
from gap_torch.losses import MaskedLoss, dice_loss
from segmentation.errors import InputError
from segmentation.networks.attachments import (
    Attach,
    MedicalDecoders,
    PerturbedDecoders,
    PerturbedFeatures,
    PerturbedPyramid,
    Pyramid,
    SignedDistances,
    TwiceUpsampled,
    Twin,
    Upsampled,
)

DECAY = 0.99  # of teachers
RADIUS, XI = 6 / 256, 10 / 256  # of VAT


@dataclass(frozen=True)
class Setting:
    """What every builder is given: of the recipe, of the data set, and the model at its start."""

    model: nn.Module
    weak: Augmentation
    strong: Callable[[Tensor], Tensor]
    channels: int
    """Of an image."""
    dimensions: int
    """Of space."""
    num_classes: int
    tau: float
    loss: MaskedLoss
    """R of equation 7."""
    targets: Mode


def _em(s: Setting) -> Method:
    return EntropyMinimisation(s.weak)


def _pseudo_label(s: Setting) -> Method:
    return PseudoLabel(s.weak, s.tau, s.loss, mode=s.targets)


def _ict(s: Setting, *, beta: float = 0.1, decay: float = DECAY) -> Method:
    return ICT(Teacher(s.model, decay), s.weak, beta, mode=s.targets)


def _mixup(s: Setting, *, beta: float = 0.2) -> Method:
    return MixUp(s.weak, beta, mode=s.targets)


def _cutmix(s: Setting, *, p: float = 1.0, decay: float = DECAY, target: str = "pseudo_labels") -> Method:
    teacher = Teacher(s.model, decay)
    if _chosen("target", target, "pseudo_labels", "probabilities"):
        return CutMixMeanTeacher(teacher, s.weak, CutMix(p, share=(0.5, 0.5), aspect=2.0), s.tau)
    return CutMixSeg(s.weak, CutMix(p), s.tau, s.loss, mode=s.targets, teacher=teacher)


def _vat(
    s: Setting, *, radius: float = RADIUS, xi: float = XI, iterations: int = 1, variant: str = "original"
) -> Method:
    if _medical(variant):
        if (radius, xi) != (RADIUS, XI):
            raise ValueError("variant=medical has a radius and a xi of its own, in other units; leave theirs out.")
        return DiceVAT(s.weak, iterations=iterations)
    return VAT(s.weak, radius, xi, iterations, mode=s.targets)


def _fixmatch(s: Setting, *, cutmix: float = 0.5) -> Method:
    return _with_threshold(s, s.tau, cutmix)


def _flexmatch(s: Setting, *, cutmix: float = 0.5, momentum: float = 0.99) -> Method:
    return _with_threshold(s, CurriculumThreshold(s.num_classes, s.tau, momentum), cutmix)


def _freematch(s: Setting, *, cutmix: float = 0.5, momentum: float = 0.999) -> Method:
    return _with_threshold(s, SelfAdaptiveThreshold(s.num_classes, momentum), cutmix)


def _unimatch(s: Setting, *, cutmix: float = 0.5) -> Method:
    return UniMatch(s.weak, s.strong, s.tau, CutMix(cutmix), s.loss, mode=s.targets)


def _bcp(s: Setting, *, decay: float = DECAY, script: str = "acdc") -> Method:
    from segmentation.scoring.components import largest_components  # needs SciPy, which the table does not

    teacher = Teacher(s.model, decay, warm_up=False)
    dice = linear_dice_loss if _chosen("script", script, "acdc", "la") else None
    return BCP(teacher, s.weak, largest_components, dice, mode=s.targets)


def _bcp_pre_training(s: Setting, *, script: str = "acdc") -> Method:
    if _chosen("script", script, "acdc", "la"):
        return BCPPreTraining(by_region=False, dice=linear_dice_loss)
    return BCPPreTraining()


def _mean_teacher(s: Setting, *, noise: float = 0.1, decay: float = DECAY) -> Method:
    return MeanTeacher(Teacher(s.model, decay), s.weak, noise, mode=s.targets)


def _uamt(
    s: Setting, *, noise: float = 0.1, pairs: int = 4, bound: float = math.log(2), decay: float = DECAY
) -> Method:
    return UAMT(Teacher(s.model, decay), s.weak, noise, pairs, bound, mode=s.targets)


def _urpc(s: Setting, *, variant: str = "original") -> Method:
    return MedicalURPC(s.weak) if _medical(variant) else URPC(s.weak)


def _cct(s: Setting, *, variant: str = "original") -> Method:
    return MedicalCCT(s.weak) if _medical(variant) else CCT(s.weak, mode=s.targets)


def _cps(s: Setting) -> Method:
    return CPS(s.weak)


def _mcnet(s: Setting, *, temperature: float = 0.1, variant: str = "original") -> Method:
    _chosen("variant", variant, "original", "plus")  # of which the network alone knows: it has a decoder more
    return MCNet(s.weak, temperature)


def _dct(s: Setting) -> Method:
    return DCT(s.weak)


def _dct_views(s: Setting, *, radius: float = 0.02, cot: float = 10.0, dif: float = 0.5) -> Method:
    return ViewsDCT(s.weak, radius, cot, dif)


def _dtc(s: Setting, *, k: float = 1500.0, distance_weight: float = 0.3) -> Method:
    return DTC(s.weak, k, distance_weight)


def _dan(s: Setting) -> Method:
    return DAN(_adversary(s, s.num_classes), s.weak)


def _sassnet(s: Setting, *, distance_weight: float = 0.3) -> Method:
    return SASSNet(_adversary(s, s.num_classes - 1), s.weak, distance_weight)


def _adversary(s: Setting, map_channels: int) -> Adversary:
    return Adversary(Discriminator(map_channels, s.channels, s.dimensions))


def _medical(variant: str) -> bool:
    """Whether the method is to be as in public code for medical images (docs/methods.md)."""
    return _chosen("variant", variant, "original", "medical")


def _chosen(name: str, word: str, default: str, other: str) -> bool:
    """Whether the option `name` is not at its default."""
    if word not in (default, other):
        raise ValueError(f"{name} must be {default} or {other}, got {word!r}.")
    return word == other


def _with_threshold(s: Setting, tau: float | Threshold, cutmix: float) -> Method:
    return FixMatch(s.weak, s.strong, tau, cutmix=CutMix(cutmix), loss=s.loss, mode=s.targets)


@dataclass(frozen=True)
class Own:
    """The part of a recipe that methods differ in, where neither preset nor command line say otherwise."""

    labelled_weight: float = 1.0
    """Of the labelled loss."""
    unlabelled_loss: Literal["ce_dice", "dice"] = "ce_dice"
    """R of equation 7: cross-entropy and Dice as in the paper, or Dice alone as in UniMatch."""
    weight: float = 1.0
    """Of the consistency loss, at theta and at theta*; at the end of the ramp-up."""
    ramp_up: float = 0.0
    """Share of the run in which that weight grows, as `training.schedules.ramp` says; 0 for none."""
    targets: Mode = "batch"
    """Mode of the model, or of its teacher, while it makes targets (`gap_torch.consistency.targets.Mode`)."""
    joint: bool = False
    """Whether labelled images go through the network together with the method's first view, in one batch; where they
    are its views (`Entry.mixed`), whether one pass is good for both losses."""
    pre_training: float = 0.0
    """Iterations of the run that this one starts from (`Entry.phase`), in its own; 0 for none."""


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        label: in tables and pictures.
        build: from a setting, and the method's options; None for labelled images alone.
        passes: what it adds to an iteration, in forward and backward passes of one batch, of which a forward pass alone
            is a third: its targets, and its loss, which GAP takes a second time.
        attachment: what it needs of the network beside its logits.
        hard: whether it learns from hard pseudo-labels, by the recipe's R.
        thresholded: whether the recipe's tau says which of them count.
        with_gap: label with GAP, where it is not "LABEL + GAP".
        own: the part of a recipe that methods differ in.
        draws: batches of unlabelled images that it takes in an iteration, as one.
        variant: its attachment where the option `variant` is not at its default, if that is another.
        beyond_logits: whether its loss reads more than logits, for which there is one reading of "aligned" alone.
        mixed: whether it mixes labelled images with others, by halves of a batch; its views, if it has any, are the
            labelled images too (`Views.mixed`).
        phase: name in `PHASES` of the run that comes before, from whose weights it starts.
    """

    label: str
    build: Callable[..., Method] | None
    passes: tuple[float, float]
    attachment: Attach | None = None
    hard: bool = False
    thresholded: bool = False
    with_gap: str = ""
    own: Own = Own()
    draws: int = 1
    variant: Attach | None = None
    beyond_logits: bool = False
    mixed: bool = False
    phase: str = ""

    def __post_init__(self) -> None:
        for name, default in self.options.items():
            if type(default) not in (bool, int, float, str):
                raise TypeError(f"{self.label}: option {name} must have a number, word or truth value as its default.")

    @property
    def options(self) -> dict[str, Any]:
        """Name of each option -> its default."""
        if self.build is None:
            return {}
        keywords = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}


# Of SSL4MIS and the codes that descend from it, the paper's first author's among them: small, and late. What learns
# from hard pseudo-labels has a weight of 1 from the start, as in FixMatch.
RAMPED = Own(weight=0.1, ramp_up=1.0)
TARGETS = 1 / 3
TABLE: dict[str, Entry] = {
    "supervised": Entry("Supervised", None, (0, 0)),
    "em": Entry("EM", _em, (0, 1), own=RAMPED),
    "pseudo_label": Entry("Pseudo Label", _pseudo_label, (TARGETS, 1), hard=True, thresholded=True),
    "ict": Entry("ICT", _ict, (TARGETS, 1), own=RAMPED),
    "mixup": Entry("MixUp", _mixup, (TARGETS, 1), own=RAMPED),
    "cutmix": Entry("CutMix", _cutmix, (TARGETS, 1), hard=True, thresholded=True),
    "vat": Entry("VAT", _vat, (1, 1), own=RAMPED),  # its search has gradients of images alone: two thirds
    "fixmatch": Entry("FixMatch", _fixmatch, (TARGETS, 1), hard=True, thresholded=True, with_gap="GapMatch"),
    "flexmatch": Entry("FlexMatch", _flexmatch, (TARGETS, 1), hard=True, thresholded=True),
    "freematch": Entry("FreeMatch", _freematch, (TARGETS, 1), hard=True),
    # targets of two batches; decoding perturbed features too is 0.64 of a pass, in the labelled one as well
    "unimatch": Entry(
        "UniMatch",
        _unimatch,
        (1.52, 3.64),
        PerturbedFeatures,
        hard=True,
        thresholded=True,
        own=Own(labelled_weight=0.5, unlabelled_loss="dice", weight=0.5, targets="train", joint=True),
        draws=2,
    ),
    "bcp": Entry(
        "BCP",
        _bcp,
        (TARGETS, 1),
        own=Own(weight=0.5, targets="train", joint=True, pre_training=1 / 3),
        mixed=True,
        phase="bcp_pre_training",
    ),
    "mean_teacher": Entry("Mean Teacher", _mean_teacher, (TARGETS, 1), own=RAMPED),
    # of the teacher, 1 + 2 * 4 batches
    "uamt": Entry("UAMT", _uamt, (9 * TARGETS, 1), own=replace(RAMPED, targets="train")),
    "urpc": Entry("URPC", _urpc, (0, 1.01), Pyramid, own=RAMPED, variant=PerturbedPyramid),
    # its further decoders run in the labelled pass too
    "cct": Entry("CCT", _cct, (1, 2.5), PerturbedDecoders, own=RAMPED, variant=MedicalDecoders),
    # its second network runs in every pass, in the labelled one too
    "cps": Entry("CPS", _cps, (1 + 2 * TARGETS, 2), Twin, own=RAMPED),
    # its second decoder is 0.67 of a pass, in the labelled one as well; labelled images are compared too
    "mcnet": Entry("MC-Net", _mcnet, (0.67, 3.35), Upsampled, own=RAMPED, variant=TwiceUpsampled),
    "dct": Entry("DCT", _dct, (0, 2), own=RAMPED),
    # adversaries around labelled and unlabelled images, each for one of the two networks
    "dct_views": Entry(
        "DCT, two networks", _dct_views, (1 + 8 * TARGETS, 6 + 2 * TARGETS), Twin, own=Own(ramp_up=80 / 600)
    ),
    # labelled images in the loss too; the head of distances runs in the labelled pass as well
    "dtc": Entry("DTC", _dtc, (0.01, 2.02), SignedDistances, own=Own(ramp_up=1.0), beyond_logits=True),
    # targets: the discriminator's step, for which both batches are predicted; the loss goes through it to its input
    "dan": Entry("DAN", _dan, (1.80, 1.38), own=RAMPED),
    "sassnet": Entry(
        "SASSNet", _sassnet, (1.81, 1.38), SignedDistances, own=Own(weight=0.01, ramp_up=1.0), beyond_logits=True
    ),
}
PHASES: dict[str, Entry] = {
    "bcp_pre_training": Entry("BCP, pre-training", _bcp_pre_training, (0, -1 / 2), mixed=True),
}
"""Runs that others start from; nobody asks for one by its name."""
ENTRIES: Mapping[str, Entry] = ChainMap(TABLE, PHASES)


def attachment(method: str, options: Mapping[str, Any]) -> Attach | None:
    """What `method` needs of the network beside its logits, with all its `options`."""
    entry = ENTRIES[method]
    default = entry.options.get("variant")
    return entry.variant if options.get("variant", default) != default and entry.variant else entry.attachment


def build(method: str, setting: Setting, options: Mapping[str, Any]) -> Method | None:
    """The method for `setting.model`, on its device; None where labelled images are all there is.

    Raises:
        InputError: an option is out of range.
    """
    make = ENTRIES[method].build
    if make is None:
        return None
    try:
        return make(setting, **options).to(next(setting.model.parameters()).device)
    except ValueError as error:
        raise InputError(f"--option of {method}: {error}") from None


def parsed(method: str, options: Mapping[str, str], num_classes: int, tau: float) -> dict[str, Any]:
    """Those of `options`, name -> text, that `method` has, as values of the type of its defaults.

    The method is built once with a stand-in for the model, to hear what it says to them before the data are read.

    Raises:
        InputError: no such value, or out of range.
    """
    defaults = TABLE[method].options
    values = {name: _value(name, text, type(defaults[name])) for name, text in options.items() if name in defaults}
    if values:
        same, data = nn.Identity(), {"channels": 1, "dimensions": 2, "num_classes": num_classes}
        build(method, Setting(nn.PReLU(), same, same, **data, tau=tau, loss=dice_loss, targets="eval"), values)
    return values


def _value(name: str, text: str, kind: type) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise InputError(f"--option {name}={text}: {text!r} is not a value of {name}, {kind.__name__}.") from None
