"""What the fork server imports once, before any instance is forked from it."""

import gc

import triptych.engine.worker  # noqa: F401

# Objects that live for ever are moved out of the collector's sight: otherwise its first pass in a child would touch,
# and so copy, every page that the children share.
gc.collect()
gc.freeze()
