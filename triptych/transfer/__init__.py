"""Moves blocks between the slabs of instances with one-sided reads. Knows no model, no stage and no pool."""
