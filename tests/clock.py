"""Time as a test tells it."""


class Clock:
    """Gives the seconds that it was told last; an `add` is all that passes."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def add(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
