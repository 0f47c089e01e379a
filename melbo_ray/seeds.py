"""One seed, split: each draw has a seed of its own, and can be repeated alone."""

import hashlib


def derive_seed(seed: int, concept: str, index: int, purpose: str) -> int:
    """A seed of 63 bits from (seed, concept, index, purpose)."""
    digest = hashlib.sha256(f"{seed}/{concept}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
