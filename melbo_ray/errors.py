"""What a person is told when something is wrong."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, what was expected, and what to do. Jobs print it and exit with 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, from `ray job stop` or a scheduler: it ends a job as Ctrl-C does, but for the exit code."""


def first_line(error: BaseException) -> str:
    """An error's message cut to its first line: what a person reads, without the traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
