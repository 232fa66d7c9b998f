"""hypothesis: `make test` tries the same examples every time, so that a change breaks what it breaks and nothing else;
`make explore` tries others, as many as it is told, and a failure that it finds becomes a test."""

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("explore" if os.environ.get("TRIPTYCH_EXPLORE") else "fixed")
