"""A server in a process of its own, so that what it holds can be told from what its tormentors hold.

`python -m tests.fuzz.served FOLDER PLACEMENT` says its address, and ends when its standard input does.
"""

import sys
from pathlib import Path

from tests.flows.servers import running
from triptych.server import connections, http
from triptych.telemetry import set_up_logging

LIMITS = {
    "max_model_len": 2048,
    "max_body_bytes": 8 << 20,
    "max_media_bytes": 4 << 20,
    "max_image_pixels": 1_000_000,
    "media_fetch_timeout_s": 1.0,
    "media_store_bytes": 1 << 20,
    "kv_cache_bytes": 16 << 20,
    "embedding_cache_bytes": 4 << 20,
}
PATIENCE_S = 2.0  # with slow clients, where a real server has a minute


def main() -> None:
    set_up_logging(process="server")
    connections.HEAD_TIMEOUT_S = http.BODY_GRACE_S = PATIENCE_S
    with running(Path(sys.argv[1]), sys.argv[2], **LIMITS) as url:
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
