"""The command line: parses, calls `qtool.api`, prints. Everything heavy is imported inside the commands."""

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import click

from qtool import __version__
from qtool.cli import analyze, bench, evaluate, look, quantize
from qtool.cli.together import HELP, jobs_of, meeting, shares, speaks, tell_in_json
from qtool.errors import InterruptedRun, QtoolError, UnavailableError, UsageError, said_by_parent, stopped

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="qtool")
def cli() -> None:
    """Post-training quantization of Transformer models: calibrate, quantize, evaluate.

    Exit codes: 0 fine, 1 a bug in qtool, 2 usage, 3 bad input, 4 the environment cannot do it, 5 a quality gate failed,
    129, 130 and 143 interrupted (continue with --resume).
    """


for command in (
    quantize.quantize, quantize.calibrate, evaluate.evaluate, evaluate.run,
    bench.bench, analyze.analyze, look.inspect, look.methods, look.schema, look.doctor, look.demo,
):  # fmt: skip
    cli.add_command(command)


_WAY_OUT = 5.0
"""Seconds after a signal in which others change nothing: launchers send it to all, and again."""
_heard: list[float] = []


def _on_signal(number: int, frame: Any) -> None:
    now = time.monotonic()
    if not _heard or now - _heard[-1] > _WAY_OUT:  # a library may have swallowed what the last one raised
        _heard.append(now)
        raise InterruptedRun(stopped(128 + number), number)


def main() -> None:
    """Run a command and exit with the code that says how it ended."""
    signal.signal(signal.SIGTERM, _on_signal)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _on_signal)  # the terminal was closed
    code = _status()
    if "RANK" in os.environ:
        # A thread of torch.distributed that lets go of a tensor while the interpreter ends would abort the process.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _status() -> int:
    try:
        if shares(cli, sys.argv[1:]) and not HELP & {*sys.argv[1:]}:
            import numpy  # noqa: F401  # before torch, which loses what a signal raises while it imports numpy itself
        if (count := jobs_of(cli, sys.argv[1:])) > 1:
            from qtool import jobs

            return jobs.run(count, sys.argv[1:])
        with meeting(cli):
            ended = cli.main(prog_name="qtool", standalone_mode=False)
        sys.stdout.flush()  # while it still makes a difference that it cannot be written
    except (QtoolError, InterruptedRun) as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        tell_in_json(error.format_message(), UsageError.exit_code, sys.argv[1:])
        if speaks():
            error.show()
        return UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail(stopped(128 + signal.SIGINT), 128 + signal.SIGINT)
    except (BrokenPipeError, SystemExit) as error:  # click and rich exit when the reader of stdout is gone: no verdict
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            return _fail(error.code, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        return 128 + signal.SIGPIPE
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU; torch itself is not imported here
            return _crash()
        return _fail(
            "the GPU has not enough memory: take a smaller --batch-size or --max-length, or leave out --device",
            UnavailableError.exit_code,
        )
    except OSError as error:
        from qtool.errors import environment_problem

        problem = environment_problem(error)
        return _fail(str(problem), problem.exit_code) if problem else _crash()
    except Exception:
        return _crash()
    return ended if isinstance(ended, int) else 0  # what `context.exit` was given


def _fail(message: str, code: int) -> int:
    """One line on stderr, of one of the processes that carry out a command."""
    tell_in_json(message, code, sys.argv[1:])
    if speaks() and not said_by_parent(code):
        print(f"qtool: {' '.join(message.split())}", file=sys.stderr)
    return code


def _crash() -> int:
    import traceback

    traceback.print_exc()
    print(f"qtool {__version__}: this is a bug in qtool; please report it with the lines above", file=sys.stderr)
    return 1
