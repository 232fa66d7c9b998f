"""What clients ask for on simulated time: when, which media, how much text, how long an answer."""

from triptych.planning.demand import Demand, Item, Phase, Rows, poisson

__all__ = ["Demand", "Item", "Phase", "Rows", "poisson"]
