"""A cluster of the real stages and the real router on simulated time, and what its runs come to."""
