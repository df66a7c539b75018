"""``python -m pipelines.sandbox --port 4599 --state DIR``: serve until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
from pathlib import Path

from pipelines.sandbox.server import PortTaken, Sandbox


def main(arguments: list[str] | None = None) -> int:
    """Run the sandbox in the foreground; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.sandbox", description="AWS on loopback")
    parser.add_argument(
        "--port", type=int, default=4599, help="TCP port on 127.0.0.1, 0 for a free one (%(default)s)"
    )
    parser.add_argument("--state", type=Path, help="scratch folder; a temporary one by default")
    parser.add_argument("--region", default="us-east-1", help="the region it plays (%(default)s)")
    parser.add_argument(
        "--isolation",
        choices=("bubblewrap", "unshare", "environment"),
        help="how jobs get their own /opt/ml; the strongest that works by default",
    )
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with tempfile.TemporaryDirectory(prefix="mla-sandbox-") as temporary:
        sandbox = Sandbox(
            options.state or Path(temporary), options.port, region=options.region, isolation=options.isolation
        )
        try:
            sandbox.start()
        except PortTaken as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(
            f"export AWS_ENDPOINT_URL={sandbox.endpoint_url} AWS_DEFAULT_REGION={options.region} "
            "AWS_ACCESS_KEY_ID=sandbox AWS_SECRET_ACCESS_KEY=sandbox",
            flush=True,
        )
        ended.wait()
        sandbox.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
