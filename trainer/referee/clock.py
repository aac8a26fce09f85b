"""The clock: when training starts, how much of the budget is used, when the feed closes. Pure.

Every method is told the time (seconds of one monotonic clock), so that a test can be any clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

LEAST_WINDOW_S = 1.0  # scoring must be asked for within max(this, 1 %) of a wall budget's end


@dataclass(frozen=True)
class Terms:
    """What a run is granted. Fixed before it starts."""

    kind: Literal["wall", "tokens"]
    amount: float  # wall seconds or tokens
    startup_free_s: float
    warmup_tokens: int
    ceiling_s: float | None = None  # token budgets: wall time that closes the feed all the same

    @property
    def seconds(self) -> float:
        """Wall time after which the feed closes; infinite for a token budget without ceiling."""
        if self.kind == "wall":
            return self.amount
        return math.inf if self.ceiling_s is None else self.ceiling_s

    @property
    def window_s(self) -> float:
        """How long after the close scoring may still be asked for."""
        return max(LEAST_WINDOW_S, self.amount / 100) if self.kind == "wall" else math.inf

    @property
    def time_budget(self) -> float:
        """What TIME_BUDGET reads: room for a loop that times itself and stops one step late."""
        return 0.98 * self.amount if self.kind == "wall" else self.seconds


class Clock:
    """Start-up and warm-up are free up to a limit; what goes beyond is charged to the budget.

    The clock starts with the first batch that would go beyond the warm-up tokens: a huge first
    batch is no way to train for free.
    """

    def __init__(self, terms: Terms, begun: float):
        self.terms = terms
        self.begun = begun  # when the program was started
        self.started: float | None = None  # when the first batch after the warm-up was handed out
        self.closed: float | None = None
        self.closed_by: str | None = None  # "wall", "tokens", "score"
        self.served = 0  # tokens handed out, the warm-up's included
        self.trained = 0  # of those, after the warm-up
        self.scored: float | None = None  # when scoring was asked for
        self._last = 0  # tokens of the last batch after the warm-up

    def hand_out(self, now: float, tokens: int) -> bool:
        """Count a batch of `tokens`. False: the feed is closed, nothing new may be handed out."""
        if self._is_closed(now):
            return False
        if self.started is None and self.served + tokens <= self.terms.warmup_tokens:
            self.served += tokens
            return True
        if self.started is None:
            self.started = now
        if not self.has_room_for(tokens):
            self.closed, self.closed_by = now, "tokens"
            return False
        self.served += tokens
        self.trained += tokens
        self._last = tokens
        return True

    def has_room_for(self, tokens: int) -> bool:
        """Whether a budget of tokens allows so many more. (That of wall time always does.)"""
        return self.terms.kind == "wall" or self.trained + tokens <= self.terms.amount

    def progress(self, now: float) -> float:
        """Share of the budget used, in [0, 1], the batch just handed out included.

        Exactly 1 from the close on, and with the last batch that a token budget has room for, so
        that a loop which looks at it takes no step on a repeated batch.
        """
        if self._is_closed(now):
            return 1.0
        if self.terms.kind == "wall":
            return min(1.0, self.elapsed(now) / self.terms.amount)
        return 1.0 if not self.has_room_for(self._last) else self.trained / self.terms.amount

    def pace(self) -> float:
        """Progress per second from now on: 0 in the warm-up, after the close, and by tokens."""
        running = self.started is not None and self.closed is None
        return 1 / self.terms.amount if running and self.terms.kind == "wall" else 0.0

    def ask_score(self, now: float) -> float:
        """Close the feed for good. Returns the overrun: seconds past the end of a wall budget."""
        if not self._is_closed(now):
            self.closed, self.closed_by = now, "score"
        self.scored = now
        return self.overrun(now)

    def is_late(self, now: float) -> bool:
        """Whether the window for scoring is over."""
        return self.overrun(now) > self.terms.window_s

    def overrun(self, now: float) -> float:
        """Seconds past the end of a wall budget; 0 for a token budget."""
        return max(0.0, now - self._closing()) if self.terms.kind == "wall" else 0.0

    def charged(self, now: float) -> float:
        """Seconds of start-up and warm-up beyond the free ones."""
        until = now if self.started is None else self.started
        return max(0.0, until - self.begun - self.terms.startup_free_s)

    def elapsed(self, now: float) -> float:
        """Seconds of the budget used, the charged ones included."""
        running = 0.0 if self.started is None else now - self.started
        return self.charged(now) + running

    def report(self, now: float) -> dict[str, Any]:
        """Times in seconds and tokens, for the record; None where a phase was never reached."""
        end = now if self.closed is None else min(now, self.closed)
        reached = self.started if self.started is not None else self.scored
        return {
            "startup_seconds": None if reached is None else round(reached - self.begun, 6),
            "charged_seconds": round(self.charged(end), 6),
            "training_seconds": None if self.started is None else round(end - self.started, 6),
            "overrun_seconds": None if self.scored is None else round(self.overrun(self.scored), 6),
            "closed_by": self.closed_by,
            "tokens": self.trained,
            "tokens_served": self.served,
        }

    def _closing(self) -> float:
        """When wall time closes the feed, as things stand."""
        if self.started is None:
            return self.begun + self.terms.startup_free_s + self.terms.seconds
        return self.started + self.terms.seconds - self.charged(self.started)

    def _is_closed(self, now: float) -> bool:
        if self.closed is None and now >= self._closing():
            self.closed, self.closed_by = self._closing(), "wall"
        return self.closed is not None
