"""A training script as far as its page's lines reach, and the two tests that every such script has.

The lines of a page run by `exec` on a loop's `names`, which are the script's.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gap_torch
from gap_torch.reference import algorithm_1

EPS, ALPHA = 0.1, 0.5  # the pages' eps; alpha is set by the test, since with 1 a forgotten alpha would go unnoticed


class Loop:
    """One iteration after the other, with `loss.backward()` in the middle.

    A derived class puts an iteration's names there in `forward`, and writes its losses anew in `unsupervised` and
    `supervised`, for a copy of one of the networks.
    """

    def __init__(self, **networks: nn.Module) -> None:
        """`networks` are named "model", or "model1" and "model2". Their optimizers get the names of the scripts."""
        self.networks = {name.replace("model", "optimizer"): network for name, network in networks.items()}
        optimizers = {
            name: torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4)
            for name, network in self.networks.items()
        }
        self.names: dict[str, Any] = {"torch": torch, **networks, **optimizers}
        self.dtype = next(next(iter(networks.values())).parameters()).dtype

    def forward(self) -> None:
        """Everything up to `loss`."""
        raise NotImplementedError

    def unsupervised(self, twin: Any, optimizer: str) -> Tensor:
        """Of a copy of the network that `optimizer` trains."""
        raise NotImplementedError

    def supervised(self, twin: Any, optimizer: str) -> Tensor:
        """Of a copy of the network that `optimizer` trains."""
        raise NotImplementedError

    def end(self) -> None:
        """What comes after the step."""

    def iterate(self, backward: str = "loss.backward()") -> None:
        self.forward()
        self.zero_grad()
        exec(backward, self.names)
        for name in self.networks:
            self.names[name].step()
        self.end()

    def zero_grad(self) -> None:
        for name in self.networks:
            self.names[name].zero_grad()


def takes_the_step_of_gap(loop: Loop, wrap: str, backward: str, updated_with: Callable) -> None:
    """Each network's gradient at the step is Algorithm 1's, its statistics are those of theta, and `check` agrees."""
    _wrap(loop, wrap)
    twins = copy.deepcopy(loop.networks)
    seen = {name: updated_with(loop.names[name]) for name in loop.networks}
    first = next(iter(loop.networks))
    with gap_torch.check(loop.names[first], loop.networks[first], show=None) as report:
        loop.forward()
        before = {name: _statistics(network) for name, network in loop.networks.items()}
        loop.forward = lambda: None
        loop.iterate(backward)
    assert report.ok, report.problems
    assert not any(note.kind == "not told" for note in report.notes), report.notes
    for name, twin in twins.items():
        expected = algorithm_1(
            list(twin.parameters()),
            lambda twin=twin, name=name: loop.unsupervised(twin, name),
            lambda twin=twin, name=name: loop.supervised(twin, name),
            eps=EPS,
            alpha=ALPHA,
        )
        torch.testing.assert_close(seen[name], expected)
        torch.testing.assert_close(_statistics(loop.networks[name]), before[name], rtol=0, atol=0)


def is_the_plain_loop_without_the_lines(make: Callable[[], Loop], wrap: str) -> None:
    """Wrapped, and with `loss.backward()` as it was, it is the script's own loop bit for bit."""
    ends = []
    for before in ("", wrap):
        torch.manual_seed(3)
        loop = make()
        _wrap(loop, before)
        for _ in range(3):
            loop.iterate()
        ends.append([value.state_dict() for value in loop.names.values() if isinstance(value, nn.Module)])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def _wrap(loop: Loop, wrap: str) -> None:
    """Run the page's first block on each optimizer."""
    for name in loop.networks if wrap else ():
        exec(wrap.replace("optimizer =", f"{name} =").replace("(optimizer,", f"({name},"), loop.names)
        assert loop.names[name].eps == EPS
        for group in loop.names[name].param_groups:
            group["gap_alpha"] = ALPHA


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}
