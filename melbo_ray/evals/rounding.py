"""The error that rounded products (option `eval_products`) make in KL, on a run's own prompt and base."""

import torch

from melbo_ray.evals.context import Study
from melbo_ray.evals.kl import next_token
from melbo_ray.runs.checks import ROUNDED, Check

# Parts of the base: the unsteered model, and vectors near the base, as a chain's are.
_PARTS = (0.0, 0.5, 0.75, 0.9)


def rounding_error(study: Study) -> dict[str, Check]:
    """The largest error of KL(P_n‖P_base), nats, for vectors that are parts of the base; nothing without rounding."""
    if study.rounded is study:
        return {}
    thetas = torch.tensor(_PARTS)[:, None] * study.base
    exact, rounded = ([row["kl_from_base"] for row in next_token(own, thetas)] for own in (study, study.rounded))
    errors = [abs(ours - theirs) for ours, theirs in zip(rounded, exact, strict=True)]
    pairs = ", ".join(f"{error:.1g} of {kl:.2g}" for error, kl in zip(errors, exact, strict=True))
    reason = f"{study.config.eval_products}, errors of KL {pairs} nats"
    return {
        "products": {
            "error": max(errors), "tolerance": exact[0], "compared": len(exact), "verdict": ROUNDED, "reason": reason,
        }
    }  # fmt: skip
