"""A Flower home with ports of its own, so that a measurement meets no SuperLink but its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_flower(home: Path) -> Iterator[dict[str, str]]:
    """Yield the environment variables of a Flower home; the SuperLink that it started is ended at the end."""
    import psutil

    ports = [_free_port(), _free_port()]
    try:
        yield {
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
            "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        }
    finally:
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "--port" in line and ports[0] in line:
                process.terminate()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
