"""User errors, which are shown as one message without a traceback, and the end of a run that was told to stop."""

import sys

# EX_TEMPFAIL of sysexits.h: the same command can be given again.
STOPPED = 75


class UserError(Exception):
    """Something the user typed or gave can't be done.

    The message names what was typed, what was expected, and what to do. Commands print it without a
    traceback and exit with code 2 (`gpt2_core.cli.run`).
    """


class RunError(UserError):
    """A run that was started as asked failed (its loss isn't finite, for example): exit code 1."""


class DivergedError(RunError):
    """A run has left out so many updates in a row, for a loss or gradients that aren't finite, that it ends.

    `step` is the last of them.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class SaveError(Exception):
    """A checkpoint could not be written: the disk is full, say, or the folder is gone. Training goes on without it."""


class Stopped(BaseException):
    """A run was told to stop by a signal, and can be resumed: exit code STOPPED.

    No Exception: like KeyboardInterrupt it must pass through code that handles all errors.
    """


def report(error: UserError | Stopped) -> int:
    """Print the message on which a command ends; returns its exit code."""
    message = f"{error}\n" if isinstance(error, Stopped) else f"error: {error}\n"
    sys.stderr.write(message)  # in one piece: other processes may write to the same terminal
    sys.stderr.flush()
    if isinstance(error, Stopped):
        return STOPPED
    return 1 if isinstance(error, RunError) else 2


def reason(error: Exception) -> str:
    """The first line of what an error of another library says."""
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.300}"
