"""How a run ends: exceptions that carry the exit code of the command.

0 done, 1 bug, 2 user or configuration, 3 data over budget, 4 non-finite, 5 disk full,
75 preempted and saved, 124 no progress, or another process of the run was lost, 130 Ctrl-C.
"""

DONE, BUG, USER, DATA, NON_FINITE, DISK_FULL, PREEMPTED, PROCESS_LOST, CTRL_C = 0, 1, 2, 3, 4, 5, 75, 124, 130
HUNG = PROCESS_LOST


class RunError(Exception):
    """A run that ends for a reason worth one sentence instead of a traceback. `code` is the command's exit code.

    `of_all`: where several processes train, all of them end with it, so that saying it once is enough.
    """

    code: int = BUG
    of_all: bool = False


class RunFolderError(RunError):
    """The output folder cannot be used: locked by another run, not writable."""

    code = USER


class CheckpointError(RunError):
    """A checkpoint that was asked for is damaged or does not fit the method."""

    code = USER


class NonFiniteError(RunError):
    """Loss or gradients became NaN or infinite; no parameter was touched by them."""

    code = NON_FINITE
    of_all = True


class DiskFullError(RunError):
    """Checkpoints could not be written, several times in a row or at the end."""

    code = DISK_FULL


class Interrupted(RunError):
    """Stopped by a signal after saving a checkpoint: 130 for Ctrl-C, 75 for SIGTERM and SIGUSR1."""

    of_all = True

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class ProcessLost(RunError):
    """Another process of the run died or hangs, so this one could only wait for it."""

    code = PROCESS_LOST

    def __init__(self, who: str) -> None:
        super().__init__(
            f"The run cannot go on: {who}. Started again with --resume auto it continues at the newest checkpoint."
        )


class ToldElsewhere(RunError):
    """The main process ended with this error, and has said so."""

    of_all = True

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
