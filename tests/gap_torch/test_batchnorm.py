# ruff: noqa: PT012 (blocks of several statements are what is tested)
"""Running statistics stay still while perturbed; everything else in the layers behaves as ever."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gap_torch import GAPWrapper, frozen_running_stats


class ByHand(nn.BatchNorm2d):
    """Updates its buffers whatever `track_running_stats` says: one in place, one by assignment."""

    def forward(self, x):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var = self.running_var * 0.9 + 0.1 * var
                self.num_batches_tracked += 1
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class CallsSuper(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (2, 3, 4, 4, 4)),
    "momentum=None": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 5)),
    "affine=False": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True), (4, 3, 5, 5)),
    "ByHand": (lambda: ByHand(3), (4, 3, 5, 5)),
    "CallsSuper": (lambda: CallsSuper(3), (4, 3, 5, 5)),
}


def snapshot(layer):
    return {name: (buffer, buffer.clone()) for name, buffer in layer.named_buffers()}


def assert_untouched(layer, before):
    for name, buffer in layer.named_buffers():
        assert buffer is before[name][0], name
        assert torch.equal(buffer, before[name][1]), name


@pytest.fixture(params=LAYERS, ids=str)
def layer_and_input(request, device):
    make, shape = LAYERS[request.param]
    layer = make().to(device)
    x = torch.randn(shape, device=device) * 3 + 1
    layer(x)  # statistics away from their initial values
    return layer, x


def test_buffers_are_bit_identical_and_move_again_afterwards(layer_and_input):
    layer, x = layer_and_input
    before = snapshot(layer)
    with frozen_running_stats(nn.Sequential(layer)):
        layer(x * 2)
    assert_untouched(layer, before)
    assert layer.track_running_stats
    layer(x * 2)
    assert not torch.equal(layer.running_mean, before["running_mean"][1])
    assert not torch.equal(layer.running_var, before["running_var"][1])


def test_batch_statistics_still_normalise(layer_and_input):
    layer, x = layer_and_input
    with frozen_running_stats(layer):
        inside = layer(x * 2)
    torch.testing.assert_close(inside, layer(x * 2), rtol=0, atol=0)


def test_buffers_survive_an_exception(layer_and_input):
    layer, x = layer_and_input
    before = snapshot(layer)
    with pytest.raises(KeyboardInterrupt), frozen_running_stats(layer):
        layer(x)
        raise KeyboardInterrupt
    assert_untouched(layer, before)
    assert layer.track_running_stats


def test_layers_in_evaluation_mode_still_use_their_running_statistics(layer_and_input):
    layer, x = layer_and_input
    layer.eval()
    before = snapshot(layer)
    expected = layer(x)
    with frozen_running_stats(layer):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert_untouched(layer, before)
    assert not layer.training


def test_a_graph_built_before_the_block_can_run_backward_after_it(layer_and_input):
    layer, x = layer_and_input
    x = x.clone().requires_grad_()
    earlier = layer(x).square().sum()
    with frozen_running_stats(layer):
        layer(x).sum().backward()
    earlier.backward()  # no "modified by an inplace operation"


def test_evaluation_graphs_too(layer_and_input):
    layer, x = layer_and_input
    x = x.clone().requires_grad_()
    earlier = layer.eval()(x).square().sum()
    layer.train()
    with frozen_running_stats(layer):
        layer(x)
    earlier.backward()


def test_layers_without_running_statistics_are_left_alone():
    layer = nn.BatchNorm2d(3, track_running_stats=False)
    with frozen_running_stats(layer):
        layer(torch.randn(4, 3, 5, 5))
    assert not layer.track_running_stats


def test_only_the_given_model_is_held():
    inside, outside = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with frozen_running_stats(inside):
        outside(torch.randn(4, 3))
    assert outside.num_batches_tracked == 1


def test_sync_batchnorm_is_held(device):
    layer = nn.SyncBatchNorm(3).to(device)
    before = snapshot(layer)
    with frozen_running_stats(layer):
        assert not layer.track_running_stats
        if device == "cpu":
            pytest.skip("SyncBatchNorm has no forward on the CPU; its flag is checked")
        layer(torch.randn(4, 3, device=device))
    assert_untouched(layer, before)


def test_perturbed_holds_the_statistics_of_the_model_it_is_given(device):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(device)
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    x = torch.randn(8, 4, device=device)
    for held in (model, None):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        before = snapshot(model)
        with optimizer.perturbed(held):
            model(x).square().sum().backward()
        assert torch.equal(model[1].running_mean, before["1.running_mean"][1]) == (held is model)
