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


class NoRelative(nn.Module):
    """A layer of one's own around `F.batch_norm`."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @property
    def track_running_stats(self):  # for the tests below
        return True

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


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
    "NoRelative": (lambda: NoRelative(3), (4, 3, 5, 5)),
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


def test_a_layer_whose_statistics_the_user_has_switched_off_stays_so():
    layer = nn.BatchNorm2d(3)
    layer.track_running_stats = False
    with frozen_running_stats(layer):
        pass
    assert not layer.track_running_stats


def test_contexts_may_be_nested(layer_and_input):
    layer, x = layer_and_input
    before = snapshot(layer)
    with frozen_running_stats(layer):
        with frozen_running_stats(layer):
            layer(x)
        layer(x)
    assert_untouched(layer, before)


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


class VarianceAlone(nn.Module):
    """As timm's EvoNorm B0: a running variance, no mean, updated by `copy_`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        if self.training:
            self.running_var.copy_(self.running_var.lerp(x.detach().var(0), 0.1))
        return x / self.running_var.sqrt()


class Prefixed(nn.Module):
    """Statistics by another name, and a buffer that is none."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bn_running_mean", torch.zeros(3))
        self.register_buffer("bn_running_var", torch.ones(3))

    def forward(self, x):
        return F.batch_norm(x, self.bn_running_mean, self.bn_running_var, training=self.training)


def _small():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


X = torch.linspace(-2, 3, 32).view(8, 4)
WITHOUT_TORCHS_CLASS = {
    "scripted": lambda: torch.jit.script(_small()),
    "scripted in part": lambda: nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.BatchNorm1d(3))),
    "traced": lambda: torch.jit.trace(_small(), X, check_trace=False),
    "exported": lambda: torch.export.export(_small(), (X,)).module(),
    "of one's own": lambda: nn.Sequential(nn.Linear(4, 3), NoRelative(3)),
    "with a prefix": lambda: nn.Sequential(nn.Linear(4, 3), Prefixed()),
    "a variance alone": lambda: nn.Sequential(nn.Linear(4, 3), VarianceAlone()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript's own
@pytest.mark.parametrize("kind", WITHOUT_TORCHS_CLASS)
def test_whatever_the_class_perturbed_holds_the_statistics(kind):
    model = WITHOUT_TORCHS_CLASS[kind]()
    optimizer = GAPWrapper(torch.optim.SGD(model.parameters(), 0.1))
    model(X).square().mean().backward()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with optimizer.perturbed(model):
        model(X).square().mean().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model(X)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_other_state_takes_in_the_perturbed_pass_as_any_other():
    """As the docstring says: of a pass's traces only running statistics are held."""
    model = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    before = model.parametrizations.weight[0]._u.clone()
    with frozen_running_stats(model):
        model(X)
    assert not torch.equal(model.parametrizations.weight[0]._u, before)


def test_what_a_layer_keeps_beside_its_statistics_is_its_own():
    """A queue, say: it takes in the perturbed pass, and is not copied."""
    layer = NoRelative(3)
    layer.register_buffer("queue", torch.zeros(3))
    with frozen_running_stats(layer):
        assert layer.running_mean is not None
        layer.queue += 1
    assert layer.queue.tolist() == [1, 1, 1]
