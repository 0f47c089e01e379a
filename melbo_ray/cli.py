"""A job as a command: what its exit code says."""

import signal
import sys
from collections.abc import Callable

from melbo_ray.errors import Terminated, UserError


def exit_code(main: Callable[[], None]) -> int:
    """Run a job's main function, in the main thread.

    Returns 0; or after one line that says what was wrong, or how to go on: 2, 130 for Ctrl-C, 143 for SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _terminate(*_: object) -> None:
    raise Terminated
