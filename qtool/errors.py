"""Errors that users can act on, each with the exit code that a CI job reads.

Everything a user can cause ends in a `QtoolError` with one line that says what is wrong, where, and what to do next.
Any other exception that reaches the command line is a bug in qtool (exit code 1).
"""

RESUMABLE = "the same command with --resume keeps what is finished (eval: with --json FILE)"
"""What to do after a signal."""
STOPPED = (129, 130, 143)
"""Exit codes after a signal that asks a process to end: SIGHUP, SIGINT, SIGTERM."""
JOBS_PARENT = "QTOOL_JOBS_PARENT"
"""In the environment of the ranks that `--jobs` starts: the id of the process that waits for them."""


class QtoolError(Exception):
    """Base of all expected errors; `exit_code` is the status of the command that ends with it."""

    exit_code = 1


class UsageError(QtoolError):
    """The command line asks for something that does not exist: an unknown method, task or flag value."""

    exit_code = 2


class InputError(QtoolError):
    """A model, a data set, a recipe or an output folder that cannot be used as it is."""

    exit_code = 3


class UnavailableError(QtoolError):
    """The environment cannot do it: a missing extra, no hub, no space, no permission."""

    exit_code = 4


class GateError(QtoolError):
    """A quality gate failed; the message names the gate, the measured value and the limit."""

    exit_code = 5


class InterruptedRun(BaseException):
    """A signal stopped the run; what is finished stays in the run directory.

    Like KeyboardInterrupt it is no Exception: libraries that swallow those must not swallow a termination.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def stopped(code: int) -> str:
    """The line about a command that ended with a code of `STOPPED`."""
    return f"{'interrupted' if code == 130 else 'terminated'}; {RESUMABLE}"


def said_by_parent(code: int) -> bool:
    """Whether the process that waits for this one tells people that it ended with `code`.

    `--jobs` does of signals: they may come to it, to a rank or, from a terminal, to all of them.
    """
    import os

    return code in STOPPED and os.environ.get(JOBS_PARENT) == str(os.getppid())


def tells_failure(body: object) -> bool:
    """Whether this is what a failed command of several ranks left in place of results (`--json`)."""
    return isinstance(body, dict) and {"error", "exit_code"} <= body.keys() and not {"task", "results"} & body.keys()


def one_of(name: str, known: "list[str] | tuple[str, ...]", what: str) -> str:
    """The message for an unknown `name`: the nearest known names first, else all of them."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"unknown {what} '{name}'; did you mean {' or '.join(near)}?"
    return f"unknown {what} '{name}'; known: {', '.join(sorted(known)) or 'none'}"


def environment_problem(error: OSError) -> QtoolError | None:
    """What the operating system refused, in a line; None for an error that is not about the environment."""
    import errno

    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR):
        return InputError(f"{error.filename or 'a path'}: {error.strerror}; choose another path")

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
        return UnavailableError(
            f"{error.filename or 'the system'}: {error.strerror}; free space or choose another place"
        )
    return None
