"""Every test runs on one thread, and under jaxtyping's hook: annotations of search and evals, shapes included, hold.

On one thread since what a test computes is tiny, and its figures then do not depend on the machine's cores.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

CHECKED = [f"melbo_ray.{name}" for name in ("search", "evals")]
# An int is a float, as for type checkers.
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
