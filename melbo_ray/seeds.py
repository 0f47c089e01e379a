"""One seed per random draw, derived from the run's seed, so that every draw can be repeated alone."""

import hashlib


def derive_seed(seed: int, concept: str, index: int, purpose: str) -> int:
    """A 63-bit seed, the hash of (seed, concept, index, purpose)."""
    digest = hashlib.sha256(f"{seed}/{concept}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
