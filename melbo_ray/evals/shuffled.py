"""The null of the solver: a short chain against a target that means nothing, through kl and generalization."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.evals import generalization, kl
from melbo_ray.evals.study import TRAINING, Rows, Study, Vectors
from melbo_ray.ortho import curvature, derive_seed, value_and_grad
from melbo_ray.residual import Slice
from melbo_ray.solvers import block, lbfgs
from melbo_ray.subspace import Subspace

_COUNT = 4


def run(study: Study, chain: Vectors) -> Rows:
    """Rows of kind `shuffled`, index 1 … 4 (fewer where the chain is shorter).

    What separates the chain from them is owed to the base's target, and not to the solver or to the norms it reaches.
    """
    thetas = shuffled_chain(study, min(_COUNT, len(chain)))
    vectors = Vectors("shuffled", range(1, len(thetas) + 1), thetas)
    return kl.run(study, vectors) | generalization.run(study, vectors)


def shuffled_chain(study: Study, count: int) -> Float[Tensor, "count d_model"]:
    """A chain against `shuffled_target`, orthogonal to θ₀ too, by L-BFGS with the chain's own budget and tolerance."""
    config, concept, base = study.config, study.concept.name, study.base
    part = Slice(study.model, [study.tokens(TRAINING)], config.source_layer, config.target_layer)
    with torch.no_grad():
        unsteered, reached = part.z(torch.stack([torch.zeros_like(base), base]).to(study.model.device)).cpu()
    target = shuffled_target(unsteered, reached, derive_seed(config.seed, concept, 0, "shuffled target"))
    taken, found = Subspace(len(base), 1 + count), []
    taken.add(base)
    inverse_hessian = curvature(part, base, derive_seed(config.seed, concept, 0, "probes"))
    for index in range(1, count + 1):
        seed = derive_seed(config.seed, concept, index, "shuffled start")
        start = taken.remove(torch.randn(len(base), generator=torch.Generator().manual_seed(seed)))
        found.append(taken.remove_exact(_solve(study, part, start, target, taken, inverse_hessian)).float())
        taken.add(found[-1])
    return torch.stack(found)


def shuffled_target(
    unsteered: Float[Tensor, " d_model"], reached: Float[Tensor, " d_model"], seed: int
) -> Float[Tensor, " d_model"]:
    """z(0) plus the displacement z(θ₀) − z(0) with its coordinates shuffled: as far away, and nobody's meaning."""
    order = torch.randperm(len(reached), generator=torch.Generator().manual_seed(seed))
    return unsteered + (reached - unsteered)[order]


def _solve(
    study: Study, part: Slice, start: Tensor, target: Tensor, taken: Subspace, inverse_hessian: Callable
) -> Tensor:
    config = study.config
    solver = lbfgs(
        start / start.norm() * config.radius,
        budget=config.max_evaluations,
        tolerance=config.tolerance,
        remove=taken.remove,
        inverse_hessian=lambda q: inverse_hessian(q[None])[0],
    )
    solver = block(solver, 1)
    theta = next(solver)
    while True:
        try:
            theta = solver.send(value_and_grad(part, theta, target[None], torch.tensor([0]), config))
        except StopIteration as finished:
            return finished.value.theta[0]
