"""How a run ends: exceptions that carry the exit code of the command.

0 done, 1 bug, 2 user or configuration, 3 data over budget, 4 non-finite, 5 disk full,
75 preempted and saved, 130 Ctrl-C.
"""

DONE, BUG, USER, DATA, NON_FINITE, DISK_FULL, PREEMPTED, CTRL_C = 0, 1, 2, 3, 4, 5, 75, 130


class RunError(Exception):
    """A run that ends for a reason worth one sentence instead of a traceback. `code` is the command's exit code."""

    code: int = BUG


class RunFolderError(RunError):
    """The output folder cannot be used: locked by another run, not writable."""

    code = USER


class CheckpointError(RunError):
    """A checkpoint that was asked for is damaged or does not fit the method."""

    code = USER


class NonFiniteError(RunError):
    """Loss or gradients became NaN or infinite; no parameter was touched by them."""

    code = NON_FINITE


class DiskFullError(RunError):
    """Checkpoints could not be written, several times in a row or at the end."""

    code = DISK_FULL


class Interrupted(RunError):
    """Stopped by a signal after saving a checkpoint: 130 for Ctrl-C, 75 for SIGTERM and SIGUSR1."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def exit_code(error: BaseException | None) -> int:
    """The exit code that belongs to how a run ended (None: it finished)."""
    if error is None:
        return DONE
    if isinstance(error, KeyboardInterrupt):
        return CTRL_C
    code = getattr(error, "code", BUG)
    return code if isinstance(code, int) else BUG
