"""gap-torch: Gradient-based Adversarial Perturbation (GAP) for semi-supervised training in PyTorch."""

from .batchnorm import frozen_running_stats
from .rng import RNGState
from .wrapper import GAPWrapper

__version__ = "0.1.0"
__all__ = ["GAPWrapper", "RNGState", "__version__", "frozen_running_stats"]
