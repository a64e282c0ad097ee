"""From a network to predictions of whole volumes, and to their scores."""
