"""Imports that leave logging as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def root_log_kept() -> Iterator[None]:
    """Take away the handlers that an import hangs on the root logger, as Opacus' does.

    Flower has a handler of its own and hands its lines on to the root's: they would come twice.
    """
    log = logging.getLogger()
    before = list(log.handlers)
    try:
        yield
    finally:
        for handler in set(log.handlers).difference(before):
            log.removeHandler(handler)
