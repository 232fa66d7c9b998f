"""The three stages as pure state machines: admit, schedule, commit. Read base, encode, prefill, decode."""
