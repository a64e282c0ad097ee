"""All that is wrong with what the user has, in one message."""

from collections.abc import Iterable


class Problems(ValueError):
    """What the user has to put right; each entry names a file or a folder and says what to do."""

    def __init__(self, where: str, entries: Iterable[str]) -> None:
        self.entries = list(entries)
        super().__init__("\n".join([f"{where}: {len(self.entries)} to put right.", *(f"- {e}" for e in self.entries)]))
