"""Every test runs on one thread: what it computes is tiny, and figures then do not depend on the machine's cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
