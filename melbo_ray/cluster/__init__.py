"""A run on Ray; nothing outside this package and `jobs` imports ray.

Every actor is a `work.Worker` and may die at any time: what it finished is in storage, what it had in hand is handed
out again, and a new actor takes its place. Ray itself restarts no actor and retries no task: a retried generator that
resumes from storage would skip by position and lose vectors in silence.
"""

from melbo_ray.cluster.driver import Driver
from melbo_ray.cluster.session import connected

__all__ = ["Driver", "connected"]
