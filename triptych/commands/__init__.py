"""The commands of the command line, one per module. Heavy imports happen inside them."""
