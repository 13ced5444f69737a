"""How the caller of long work stops it and sees how far it is."""

from collections.abc import Callable
from dataclasses import dataclass

from ul_runtime.errors import StoppedError
from ul_runtime.loop import never


def _ignore(images: float) -> None:
    pass


@dataclass(frozen=True)
class Control:
    """`stop` is asked before each step (True: StoppedError); `progress` gets the share of images just done."""

    stop: Callable[[], bool] = never
    progress: Callable[[float], None] = _ignore

    def check(self) -> None:
        """StoppedError if asked to stop."""
        if self.stop():
            raise StoppedError("stopped; nothing was written")


UNWATCHED = Control()
