"""The built-in model: a small vision-language model trained from scratch on pictures drawn by this package."""

from pathlib import Path


def checkpoint_path() -> Path:
    """The committed Hugging Face folder."""
    return Path(__file__).parent / "checkpoint"
