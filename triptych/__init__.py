"""Triptych: large multimodal models served in three stages (encode, prefill, decode) on dedicated instances."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("triptych")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
