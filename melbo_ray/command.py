"""A job as a command: what its exit code says."""

import sys
from collections.abc import Callable

from melbo_ray.config import UserError


def exit_code(main: Callable[[], None]) -> int:
    """Run a job's main function: 0, or 2 after one line that says what was wrong, or 130 when a person stopped it."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --run-id resumes a run that had begun", file=sys.stderr)
        return 130
    return 0
