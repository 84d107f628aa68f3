"""Every error foldsearch raises on purpose.

    FoldsearchError
    ├── InputError (also a ValueError)   what a person gave cannot be used: the command line exits with 2
    │   ├── PlanError      a fold plan breaks a law, or its text cannot be read
    │   ├── SpecError      a study or a space file is wrong (all its faults at once)
    │   ├── BudgetError    no plan can meet the budget
    │   ├── ModelError     the model cannot be found, read, or folded
    │   ├── DataError      the text cannot be found, read, or split
    │   └── RunError       a run folder is not what it should be
    └── VerificationError  an export is not the model that was measured: the command line exits with 1

Messages state the law, the value, and the remedy.
"""

from __future__ import annotations


class FoldsearchError(Exception):
    """Root of all errors raised on purpose by foldsearch."""


class InputError(FoldsearchError, ValueError):
    """What a person gave cannot be used; the message names the remedy."""


class PlanError(InputError):
    """A fold plan breaks a law, or its text form cannot be read."""


class SpecError(InputError):
    """A study or space file is wrong; the message lists every fault found."""


class BudgetError(InputError):
    """No plan of the space can meet the budget."""


class ModelError(InputError):
    """The dense model cannot be found, read or folded."""


class DataError(InputError):
    """The text cannot be found, read or split."""


class RunError(InputError):
    """A run folder is missing, incomplete, or belongs to another study or version."""


class VerificationError(FoldsearchError):
    """An exported model differs from the model that was measured."""
