"""Figure 1 of the GapMatch paper as a living picture: two moons, eight labels, and what each perturbation does.

    python examples/toy_boundary.py              picture, film and table in runs/toy, in seconds on a CPU
    python examples/toy_boundary.py --seeds 10   no pictures: a table over ten seeds, with two controls

All four panels start from the same weights and labels: (a) labels alone, (b) instance perturbation (FixMatch: noise on
the points), (c) model perturbation (GAP around pseudo-labels of the very same points), (d) both: GapMatch.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch, FixMatch, Method
from gap_torch.consistency.method import Augmentation
from gap_torch.losses import ce_dice_loss
from segmentation.errors import InputError
from segmentation.printing import show_every_character
from toy.margin import Score, probability_over_window, score
from toy.moons import Data, two_moons
from toy.pictures import Film, State, save_pictures
from toy.tables import duels, spread, table

FRAMES = 25  # of the film
GAPMATCH = "both: GapMatch"


@dataclass(frozen=True)
class Settings:
    iterations: int = 500
    lr: float = 0.005
    tau: float = 0.95
    eps: float = 0.1
    alpha: float = 1.0
    weak: float = 0.05
    """Standard deviation of the noise under the pseudo-labels, in the moons' units (their radius is 1)."""
    strong: float = 0.2
    """The same of the noise on top, where the pseudo-labels are learnt."""


@dataclass(frozen=True)
class Variant:
    name: str
    method: Method | None
    gap: bool = False


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def panels(settings: Settings) -> list[Variant]:
    """The four of the picture."""
    fixmatch = FixMatch(noisy(settings.weak), noisy(settings.strong), settings.tau)
    pseudo_label = FixMatch(unchanged, unchanged, settings.tau)
    return [
        Variant("labels alone", None),
        Variant("instance perturbation", fixmatch),
        Variant("model perturbation", pseudo_label, gap=True),
        Variant(GAPMATCH, fixmatch, gap=True),
    ]


def controls(settings: Settings) -> list[Variant]:
    """What tells GAP's perturbation from what comes along with it.

    (c) learns from g1 + g2, so from pseudo-labels without any perturbation too; and for g1 + alpha * g2 the
    unlabelled points weigh 1 + alpha times as much as for g1.
    """
    heavier = FixMatch(
        noisy(settings.weak),
        noisy(settings.strong),
        settings.tau,
        loss=lambda logits, target, mask: (1 + settings.alpha) * ce_dice_loss(logits, target, mask),
    )
    return [
        Variant("pseudo-labels, no perturbation", FixMatch(unchanged, unchanged, settings.tau)),
        Variant("instance perturbation, loss x (1 + alpha)", heavier),
    ]


def noisy(deviation: float) -> Augmentation:
    return lambda points: points + deviation * torch.randn_like(points)


def unchanged(points: Tensor) -> Tensor:
    return points


def train(variant: Variant, data: Data, settings: Settings, seed: int) -> Iterator[nn.Module]:
    """The model before the first iteration and after each; `seed` gives its weights and the noise."""
    torch.manual_seed(seed)
    model = network()
    optimizer = GAPWrapper(
        torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=1e-4), settings.eps, settings.alpha
    )
    yield model
    for _ in range(settings.iterations):
        step(model, optimizer, variant, data)
        yield model


def step(model: nn.Module, optimizer: GAPWrapper, variant: Variant, data: Data) -> None:
    """One training step, on all points at once."""
    if variant.method is not None:
        views = variant.method.prepare(model, Batch(data.points))
        variant.method.loss(model, views).backward()  # g1
        if variant.gap:
            with optimizer.perturbed(model):  # theta -> theta + eps * g1 / ||g1||, and back
                variant.method.loss(model, views).backward()  # g2
    ce_dice_loss(model(data.points[data.labelled]), data.classes[data.labelled]).backward()  # g_l
    optimizer.step()
    optimizer.zero_grad()


def film(variant: Variant, data: Data, settings: Settings, seed: int) -> Film:
    """Train `variant` and keep what it looks like on the way, more often at the beginning."""
    kept = sorted({round(settings.iterations * (frame / FRAMES) ** 2) for frame in range(FRAMES + 1)})
    states = [
        State(probability_over_window(model), score(model, data))
        for iteration, model in enumerate(train(variant, data, settings, seed))
        if iteration in kept
    ]
    return Film(variant.name, kept, states)


def final_score(variant: Variant, settings: Settings, seed: int) -> Score:
    """After training, on the moons of `seed`."""
    data = two_moons(seed)
    *_, model = train(variant, data, settings, seed)
    return score(model, data)


def one_seed(settings: Settings, seed: int, out: Path) -> None:
    """Picture, film and table."""
    data = two_moons(seed)
    films = [film(variant, data, settings, seed) for variant in panels(settings)]
    save_pictures(out, data, films)
    print(table({film.name: film.states[-1].score for film in films}))


def many_seeds(settings: Settings, seeds: range, out: Path) -> None:
    """Tables over `seeds`, with the controls, and the numbers behind them."""
    variants = [*panels(settings), *controls(settings)]
    scores = {variant.name: [final_score(variant, settings, seed) for seed in seeds] for variant in variants}
    numbers = {name: [asdict(score) for score in of_seeds] for name, of_seeds in scores.items()}
    record = {"settings": asdict(settings), "seeds": [*seeds], "torch": torch.__version__, "scores": numbers}
    (out / "seeds.json").write_text(json.dumps(record, indent=1) + "\n")
    print(spread(scores), duels(scores, GAPMATCH), sep="\n\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moons, the labels, the weights and the noise")
    parser.add_argument("--seeds", type=int, help="that many, from --seed on: a table and no pictures")
    parser.add_argument("--iterations", type=int, default=Settings.iterations)
    parser.add_argument("--eps", type=float, default=Settings.eps, help="radius of the model perturbation")
    parser.add_argument("--alpha", type=float, default=Settings.alpha, help="weight of g2")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    if arguments.iterations < 1:
        raise InputError(f"--iterations: must be at least 1, got {arguments.iterations}")
    if arguments.seeds is not None and arguments.seeds < 2:
        raise InputError(f"--seeds: a spread takes at least 2, got {arguments.seeds}")
    settings = Settings(iterations=arguments.iterations, eps=arguments.eps, alpha=arguments.alpha)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.seeds is None:
        one_seed(settings, arguments.seed, arguments.out)
    else:
        many_seeds(settings, range(arguments.seed, arguments.seed + arguments.seeds), arguments.out)


def main(argv: Sequence[str] | None = None) -> int:
    show_every_character()
    torch.set_num_threads(1)  # more only get into each other's way at this size
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:  # ours and GAPWrapper's name the culprit
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
