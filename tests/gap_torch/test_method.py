"""What a model may return: logits, or logits with auxiliary ones behind them."""

import pytest
import torch
from torch import Tensor, nn

from gap_torch.consistency import Batch, PseudoLabel, auxiliary_logits, logits_of


class Dict(nn.Module):
    """Its logits in a dict, as torchvision's segmentation models have them."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": images, "aux": images}


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_models_own_logits_come_first(kind) -> None:
    own, *others = torch.randn(3, 2, 3, 4, 4)
    assert logits_of(own) is own
    assert logits_of(kind([own, *others])) is own
    assert all(map(torch.equal, auxiliary_logits(kind([own, *others])), others))


@pytest.mark.parametrize("of", [logits_of, auxiliary_logits])
@pytest.mark.parametrize("outputs", [{"out": torch.zeros(1)}, {"out": torch.zeros(1), "aux": torch.zeros(1)}, None])
def test_anything_else_is_named(of, outputs) -> None:
    with pytest.raises(TypeError, match=rf"must return logits or a tuple .* got {type(outputs).__name__};"):
        of(outputs)


def test_a_model_that_returns_a_dict_is_refused_while_it_makes_targets() -> None:
    with pytest.raises(TypeError, match="got dict"):
        PseudoLabel(lambda images: images).prepare(Dict(), Batch(torch.randn(2, 3, 4, 4)))
