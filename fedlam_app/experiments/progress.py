"""How far a job is: rounds done of rounds to do, weighted by what a round costs, and the time left."""

from __future__ import annotations

import threading
import time


class Progress:
    """Counts device-rounds over all cells; cells run side by side, so it locks."""

    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._done = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, device_rounds: int) -> None:
        """Count the work of one finished round."""
        with self._lock:
            self._done += device_rounds

    def text(self) -> str:
        """Return such as '43 %, about 2 min left'; without the time until a tenth is done."""
        done = min(1.0, self._done / self._total)
        if done < 0.1:
            return f"{done:.0%}"
        left_s = (time.monotonic() - self._began) * (1.0 - done) / done
        return f"{done:.0%}, about {left_s / 60:.0f} min left" if left_s >= 60 else f"{done:.0%}"
