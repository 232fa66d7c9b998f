"""What a model is by its config, what fits into a device, and what a step costs: measured, or from data sheets."""
