"""Where worker processes run: this host (local)."""
