"""What would happen: simulated time over the real stages, estimates of load, and which placement suits them."""
