"""How long a test's work may take, on machines of any speed."""

from __future__ import annotations

import time

_STEPS = 1_000_000


def allowed_seconds(seconds: float = 1.0) -> float:
    """What so much time of an idle core may become where tests share its units and caches, or the core is slower."""
    start = time.process_time()
    for _ in range(_STEPS):
        pass
    # Forty million steps of a loop take an idle core of today about a second.
    return 2 * seconds * max(1.0, 40 * (time.process_time() - start))
