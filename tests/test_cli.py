"""What a job's exit code and last line say."""

import os
import signal

import pytest

from melbo_ray.cli import exit_code
from melbo_ray.errors import Terminated, UserError


def stopped_by(number):
    os.kill(os.getpid(), number)


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: raises(UserError("no such model")), 2, "error: no such model\n"),
        (
            lambda: raises(UserError("give a smaller `eval_gpus`, or `kl`")),
            2,
            "error: give a smaller --eval-gpus, or `kl`\n",
        ),
        (lambda: stopped_by(signal.SIGTERM), 143, "stopped\n"),
        (lambda: raises(KeyboardInterrupt), 130, "stopped\n"),
        (lambda: raises(Terminated("stopped; resume it")), 143, "stopped; resume it\n"),
    ],
)
def test_how_a_job_ended_is_its_exit_code_and_one_line(main, code, said, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert (exit_code(main), capsys.readouterr().err) == (code, said)
    assert signal.getsignal(signal.SIGTERM) is before
