"""How a run ended, in words: why it has no front, and why it was stopped before its limits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from foldsearch.record import Trial

ALIKE_FAILURES = 10  # in a row: the next one would most likely fail for the same reason
_NUMBERS = re.compile(r"[-+]?\d[\d.,_]*(?:e[-+]?\d+)?", re.IGNORECASE)


def why_no_front(trials: Sequence[Trial]) -> str:
    """Why no trial of a run that is over reached the last rung; empty where one did."""
    if any(trial.state == "finished" for trial in trials):
        return ""
    begun = [trial for trial in trials if trial.is_trial and trial.state != "waiting"]
    if not begun:
        return f"none of the {len(trials)} trials began" if trials else "there was no time to begin a trial"
    words = [_failures(begun)]
    for states, what in (
        (("stopped", "cut"), "stopped before the last rung"),
        (("infeasible",), "came to a plan that is above the budget"),
        (("running",), "did not end"),
    ):
        reasons = Counter(trial.reason for trial in begun if trial.state in states)
        if reasons:
            reason, _ = reasons.most_common(1)[0]
            words.append(f"{reasons.total()} of {len(begun)} {what}" + (f" ({reason})" if reason else ""))
    return "; ".join(word for word in words if word)


def failing_alike(trials: Sequence[Trial]) -> str:
    """The reason for which the latest `ALIKE_FAILURES` trials failed, if it is the same one; else empty."""
    ended = [trial for trial in trials if trial.ended and trial.state != "infeasible"][-ALIKE_FAILURES:]
    alike = {_cause(trial) for trial in ended if trial.state == "failed"}
    if len(ended) < ALIKE_FAILURES or len(alike) > 1 or any(trial.state != "failed" for trial in ended):
        return ""
    return ended[-1].reason


def _failures(begun: Sequence[Trial]) -> str:
    """How many trials failed, and the commonest cause."""
    failed = [trial for trial in begun if trial.state == "failed"]
    if not failed:
        return ""
    cause, count = Counter(_cause(trial) for trial in failed).most_common(1)[0]
    reason = next(trial.reason for trial in failed if _cause(trial) == cause)
    alike = "" if len(failed) == 1 else ", all alike" if count == len(failed) else f", {count} of them alike"
    return f"{len(failed)} of {len(begun)} trials failed{alike}: {reason}"


def _cause(trial: Trial) -> str:
    """The reason of a failure without its numbers, which differ from trial to trial."""
    return _NUMBERS.sub("#", trial.reason)
