"""What to buy: candidates, bounds, objectives, the search, and how its answer is told."""
