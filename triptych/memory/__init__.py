"""Bookkeeping of blocks: who holds which. Knows no tensor; every pool can prove that nothing leaked."""
