"""An encoder of media and its projector: exact parameters, and the work for what goes through.

A tower takes positions (patches, frames of sound) and gives rows, after the projector has merged some into one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """One encoder and its projector. Counts are of numbers, not bytes."""

    parameters: int  # of the encoder, without the projector
    projector: int = 0
    layers: int
    hidden: int
    intermediate: int
    gated: bool = False  # three matrices in an MLP instead of two
    heads: int
    head_dim: int
    inputs: int  # numbers of pixels or sound that make one position
    class_positions: int = 0  # positions of each unit that are no patch
    window: int = 0  # positions that attend to each other in the layers that do not see all; 0: all layers see all
    full_layers: int = 0  # of them, where there is a window
    eager: bool = False  # whether its attention writes down the scores of all pairs

    @property
    def flops_per_position(self) -> float:
        """Of the matrices of all layers, and of what cuts the input."""
        width = self.heads * self.head_dim
        layer = 4 * self.hidden * width + (3 if self.gated else 2) * self.hidden * self.intermediate
        return 2.0 * (self.layers * layer + self.inputs * self.hidden)

    @property
    def flops_per_row(self) -> float:
        return 2.0 * self.projector

    def flops_of_attention(self, positions: int) -> float:
        """Of one unit with so many positions."""
        pair = 4.0 * self.heads * self.head_dim
        if not self.window:
            return self.layers * pair * positions * positions
        near = positions * min(positions, self.window) * (self.layers - self.full_layers)
        return pair * (near + self.full_layers * positions * positions)


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def mlp(hidden: int, intermediate: int) -> int:
    return linear(hidden, intermediate) + linear(intermediate, hidden)
