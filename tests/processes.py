"""Ports and processes of the tests that start real servers."""

from __future__ import annotations

import socket

import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_in(folder: str) -> list[psutil.Process]:
    """Every process whose Flower home lies in ``folder``: what they start inherits it.

    What is already dead has no environment.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME", "").startswith(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found
