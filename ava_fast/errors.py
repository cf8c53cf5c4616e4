"""What can end a run, and the exit code that says so."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and says how to mend it."""

    exit_code = 2


class TrainingError(RuntimeError):
    """A run that had started cannot go on; the message is one line that says why and what is safe on disk."""

    exit_code = 3


class LostRank(TrainingError):
    """A rank failed where the others could not agree with it to go on: every rank ends, each by itself."""

    def __init__(self, message: str, *, resumable: bool):
        super().__init__(message)
        self.exit_code = Interrupted.exit_code if resumable else TrainingError.exit_code


class Interrupted(Exception):
    """The run was asked to stop, finished its step and saved; `--resume latest` continues it."""

    exit_code = 75


class Ended(Exception):
    """The run had ended for good when torchrun started its workers anew: they leave as they did then."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
