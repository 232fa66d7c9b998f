"""What the fork server imports once, before any instance is forked from it."""

import gc
import signal

# A signal to the whole process group (systemd, a shell) is the server's business, which lets running requests finish
# first: this process and its children end when the server does. Before the imports, which take seconds.
signal.signal(signal.SIGTERM, signal.SIG_IGN)

import triptych.engine.worker  # noqa: E402, F401

# Objects that live for ever are moved out of the collector's sight: otherwise its first pass in a child would touch,
# and so copy, every page that the children share.
gc.collect()
gc.freeze()
