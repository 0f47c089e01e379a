"""Errors that are reported to the user."""


class UserError(Exception):
    """Bad input; its one-line message says what is wrong, what was expected and what to do. Jobs exit with 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, sent by `ray job stop` or a scheduler; it ends a job like Ctrl-C, with another exit code."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
