"""How a run ended, in words: why it has no front, and why it was stopped before its limits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from foldsearch.search.records import Record

ALIKE_FAILURES = 10  # in a row: the next one would most likely fail for the same reason
_NUMBERS = re.compile(r"[-+]?\d[\d.,_]*(?:e[-+]?\d+)?", re.IGNORECASE)


def why_no_front(records: Sequence[Record]) -> str:
    """Why no trial of a run that is over reached the last rung; empty where one did."""
    if any(record.state == "finished" for record in records):
        return ""
    begun = [record for record in records if record.is_trial and record.state != "waiting"]
    if not begun:
        return f"none of the {len(records)} trials began" if records else "there was no time to begin a trial"
    words = [_failures(begun)]
    for state, what in (
        ("stopped", "stopped before the last rung"),
        ("infeasible", "came to a plan that is above the budget"),
        ("running", "did not end"),
    ):
        reasons = Counter(record.reason for record in begun if record.state == state)
        if reasons:
            reason, _ = reasons.most_common(1)[0]
            words.append(f"{reasons.total()} of {len(begun)} {what}" + (f" ({reason})" if reason else ""))
    return "; ".join(word for word in words if word)


def failing_alike(records: Sequence[Record]) -> str:
    """The reason for which the latest `ALIKE_FAILURES` trials failed, if it is the same one; else empty."""
    ended = [record for record in records if record.ended and record.state != "infeasible"][-ALIKE_FAILURES:]
    alike = {_cause(record) for record in ended if record.state == "failed"}
    if len(ended) < ALIKE_FAILURES or len(alike) > 1 or any(record.state != "failed" for record in ended):
        return ""
    return ended[-1].reason


def _failures(begun: Sequence[Record]) -> str:
    """How many trials failed, and the commonest cause."""
    failed = [record for record in begun if record.state == "failed"]
    if not failed:
        return ""
    cause, count = Counter(_cause(record) for record in failed).most_common(1)[0]
    reason = next(record.reason for record in failed if _cause(record) == cause)
    alike = "" if len(failed) == 1 else ", all alike" if count == len(failed) else f", {count} of them alike"
    return f"{len(failed)} of {len(begun)} trials failed{alike}: {reason}"


def _cause(record: Record) -> str:
    """The reason of a failure without its numbers, which differ from trial to trial."""
    return _NUMBERS.sub("#", record.reason)
