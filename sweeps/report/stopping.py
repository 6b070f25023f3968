"""How often a sweep's early stopping keeps its own best trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.results.leaderboard import Leaderboard
from sweeps.spec.choices import stopping_rule

if TYPE_CHECKING:
    from sweeps.search.survival import ScoreCurve

ORDERS, FEWEST_ORDERS = 200, 20


def score_curves(board: Leaderboard) -> list[ScoreCurve]:
    """Return the curves of the search's trials that recorded an epoch."""
    from sweeps.search.survival import ScoreCurve  # Ray, which takes two seconds to import

    spec, sign = board.spec, 1 if board.spec.mode == "max" else -1
    return [
        ScoreCurve(entry.params, [sign * entry.score(spec, epoch) for epoch in range(1, len(entry.results) + 1)])
        for entry in board.search_entries()
        if entry.results
    ]


def stopping_lines(board: Leaderboard) -> list[str]:
    """Return how often the early stopping keeps the best trial, in a line; none where that can't be told in seconds."""
    rule, entries = stopping_rule(board.spec.early_stopping), board.search_entries()
    if not rule.stops or sum(entry.finished for entry in entries) < 2:
        return []
    orders = min(ORDERS, rule.epochs_in_a_second // sum(len(entry.results) for entry in entries))
    if orders < FEWEST_ORDERS:
        return []
    from sweeps.search.survival import survival

    return [f"early stopping: {survival(board.spec, score_curves(board), orders)}"]
