"""UniMatch (Yang et al., 2023) in nnU-Net, with and without GAP."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, ChannelDropout, CutMix, Method, Outputs, Views

from .depths import listed, resized, summed
from .gap import WithGAP
from .heads import Heads
from .semi_supervised import SemiSupervisedTrainer


class PerturbedFeatures:
    """A pre-hook of nnU-Net's decoder, which gets the encoder's features of all resolutions.

    Inside `of_first(n)` the features of the first n samples come once more, behind all others, with half of their
    channels dropped: one pass through the network, as DDP and compilation want it.
    """

    def __init__(self) -> None:
        self.drop, self.samples = ChannelDropout(), 0

    @contextmanager
    def of_first(self, samples: int) -> Iterator[None]:
        self.samples = samples
        try:
            yield
        finally:
            self.samples = 0

    def __call__(self, decoder: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.samples == 0:
            return None
        (features,) = inputs
        return ([torch.cat((f, self.drop(f[: self.samples]))) for f in features],)


class DeepUniMatch(Method):
    """FixMatch with two strong views that have boxes of other patches, and with the weak one's perturbed features.

    In every resolution R(s_1) / 4 + R(s_2) / 4 + R(g(P(z))) / 2, as in `gap_torch.consistency.UniMatch`.

    Args:
        features: the decoder's hook.
        heads: what the outputs mean.
        weights: of each resolution.
        tau: least confidence of a pseudo-label that counts.
        cutmix: the boxes.
    """

    def __init__(
        self, features: PerturbedFeatures, heads: Heads, weights: Sequence[float], tau: float, cutmix: CutMix
    ) -> None:
        super().__init__()
        self.features, self.heads, self.weights, self.tau, self.cutmix = features, heads, weights, tau, cutmix

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Batch) -> Views:
        """Of `batch.unlabelled`, three views behind each other, (2B, 3C, *spatial).

        The first B are learnt from, and the others are pasted from. One input: the weak view and both strong ones.
        """
        weak, *strong = batch.unlabelled.chunk(3, dim=1)
        p = self.heads.probabilities(listed(model(weak))[0])
        torch.clear_autocast_cache()  # casts that were made without gradient
        labels = self.heads.labels(p, self.tau)
        own = tuple(_halves(t)[0] for t in (weak, *labels))
        views = [own, *(self._mixed(view, *labels) for view in strong)]
        images, target, mask = (torch.cat(each) for each in zip(*views, strict=True))
        return Views((images,), target, mask)

    def _mixed(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        own, partners = zip(*map(_halves, tensors), strict=True)
        return self.cutmix(*own, partners=partners)

    def loss(self, model: nn.Module, views: Views) -> Tensor:
        with self.features.of_first(len(views.inputs[0]) // 3):
            return super().loss(model, views)

    def compare(self, outputs: tuple[Outputs, ...], views: Views) -> Tensor:
        """Of the outputs for the weak view, both strong ones and the perturbed features."""
        (logits,) = map(listed, outputs)
        assert views.target is not None
        assert views.mask is not None
        parts = [o.chunk(4)[1:] for o in logits]  # each resolution's two strong views, and features
        targets, masks = resized(views.target, logits), resized(views.mask, logits)
        losses = []
        for part, view in ((0, 1), (1, 2), (2, 0)):  # the features are of the weak view
            entries = [p[part] for p in parts], [t.chunk(3)[view] for t in targets], [m.chunk(3)[view] for m in masks]
            losses.append(summed(self.heads.loss, self.weights, *entries))
        return (losses[0] + losses[1]) / 4 + losses[2] / 2


def _halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    own, partners = tensor.chunk(2)
    return own, partners


class UniMatchTrainer(SemiSupervisedTrainer):
    """UniMatch. Its pass has three patches for one of nnU-Net's, and four in the decoder; so much memory it takes.

    Raises:
        ValueError: the network has no decoder that takes an encoder's features, as nnU-Net's U-Nets have.
    """

    tau = 0.95  # least confidence of a pseudo-label
    strong_views = 2
    patches = 2

    def build_method(self) -> Method:
        network: Any = self.plain_network()
        if not (hasattr(network, "encoder") and hasattr(network, "decoder")):
            raise ValueError(
                f"{type(self).__name__} perturbs features between an encoder and a decoder, which "
                f"{type(network).__name__} does not have. Take FixMatchTrainer."
            )
        features = PerturbedFeatures()
        network.decoder.register_forward_pre_hook(features)  # before the first pass, which compiles it
        return DeepUniMatch(features, self.heads(), self.depth_weights(), self.tau, CutMix(p=0.5))


class UniMatchGAPTrainer(WithGAP, UniMatchTrainer):
    """UniMatch with GAP."""
