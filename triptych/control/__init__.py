"""Which instances there are, in which state, and what makes the target placement true."""
