"""What a device has to know of a graph: its tensors."""

from collections.abc import Sequence
from typing import Protocol


class Tensor(Protocol):
    """An input or output; see TensorFormat."""

    @property
    def name(self) -> str:
        """As the graph calls it."""

    @property
    def dtype(self) -> str:
        """As numpy calls it."""

    @property
    def shape(self) -> tuple[int | str, ...]:
        """A string is a dynamic dimension, b or g."""


class Interface(Protocol):
    """What goes into a graph and comes out."""

    @property
    def inputs(self) -> Sequence[Tensor]:
        """In no order that matters."""

    @property
    def outputs(self) -> Sequence[Tensor]:
        """Likewise."""
