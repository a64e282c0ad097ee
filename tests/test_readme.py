"""What the README shows runs as it stands."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def test_the_script_with_first_step_and_second_step_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "first_step()" in block]
    names: dict = {}
    exec(compile(script, "README.md", "exec"), names)
    accuracy = (names["model"](names["x"]).argmax(1) == names["y"]).float().mean()
    assert accuracy > 0.9
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())
