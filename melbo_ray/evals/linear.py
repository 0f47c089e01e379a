"""The linear null chain: how far a linear model of the slice would get, vector by vector, without optimising.

If z were linear in θ, z(θ) = z(0) + Jθ, the n-th vector of norm r would have at best the loss
min ‖Jx − a‖ over x orthogonal to θ₀, to what the chain avoids and to the vectors before, ‖x‖ ≤ r, with
a = z(θ₀) − z(0): a ridge problem (Golub and Kahan 1965; Björck 1996, "Numerical methods for least squares problems",
section 7.5), solved here in a Krylov space.
The linear chain takes these solutions one after the other. A linear map with equal singular values allows one vector,
as everything orthogonal to it moves z orthogonally to a; the more uneven they are, the more. Where the chain found goes
on after the linear one has ended, curvature lets it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.evals.context import Chain, Row, Rows, Study, Vectors
from melbo_ray.evals.control import more_directions
from melbo_ray.evals.jacobian import matrix, slice_of
from melbo_ray.evals.kl import next_token
from melbo_ray.host import progress
from melbo_ray.model.steering import PASS_TOKENS

# Dimension of the Krylov space: the loss at a norm is within 1e-3 of the dense solution's (tests).
_KRYLOV = 64
_HALVINGS = 60
_NOTHING_LEFT = 0.999


class Map(NamedTuple):
    """The slice to first order at 0, and where it is to lead.

    Attributes:
        jacobian: J = ∂z/∂θ at θ = 0.
        aim: a = z(θ₀) − z(0).
    """

    jacobian: Float64[Tensor, "d_model d_model"]
    aim: Float64[Tensor, " d_model"]


def run(study: Study, whole: Chain, share: str, items: Sequence[int]) -> Rows:
    """Write `linear`: for the n-th vector what a linear model allows, beside what was found; J's spectrum to `summary`.

    Kinds: `chain`, whose directions taken are the chain's own; `linear`, those of the linear chain itself, whose n-th
    vector is the best at the n-th norm found, up to the one that has no effect left; the null `random`, n − 1 random
    directions. All losses are relative to ‖a‖. `linear_loss` is the least at the norm of the n-th vector found,
    `linear_loss_at_radius` at R; `solution_loss` and `kl_from_base` are what the solution at the norm found has in the
    real model. Rows are those of at most 64 vectors, spread evenly.

    Of the vector found (null for other kinds): `relative_loss`, and `found_linear_loss`, what it would be if z were
    linear; `first_order`, Jθ·a / ‖a‖², the part of a that it has to first order; `cos`, its cosine with the linear
    solution; `half_share` and `mirrored_share`, the displacement along a of θ/2 and of −θ as a share of that of θ (½
    and −1 if z is linear, ¼ and 1 if quadratic).
    """
    chain, first = whole.vectors, whole.once("map", lambda: Map(matrix(whole, "jacobian"), study.once(aim)))
    if share == "spectrum":
        figures = spectrum(first.jacobian) | {
            "most_below_half": most(study.beside(gradient_of(first)), max(chain.norms), 0.5)
        }
        return {"summary": [study.row("chain", 0, figure=f"jacobian_{k}", value=v) for k, v in figures.items()]}
    taken = whole.once(f"linear/{share}", lambda: taken_before(study, first, chain, share))
    count = len(taken) - len(study.taken)
    places = [place for place, index in enumerate(chain.index) if index in items and place <= count]
    return {"linear": rows_beside(study, first, chain, places, share, taken)}


def gradient_of(first: Map) -> Float64[Tensor, " d_model"]:
    """The gradient g = Jᵀa / ‖a‖² at 0 of the part of a that θ has."""
    return first.jacobian.T @ first.aim / first.aim.square().sum()


def most(gradient: Float64[Tensor, " d_model"], norm: float, loss: float) -> float:
    """An upper bound of the number of orthogonal vectors of at most this norm and loss that any linear chain has.

    ‖Jθ − a‖ ≤ ℓ‖a‖ needs g·θ ≥ 1 − ℓ, and by Bessel's inequality Σ (g·θ)² / ‖θ‖² ≤ ‖g‖². `gradient` is that part of g
    which the vectors can have (`Study.beside`).
    """
    return float((gradient.norm() * norm / (1 - loss)).square())


def aim(study: Study) -> Float64[Tensor, " d_model"]:
    """The displacement a = z(θ₀) − z(0), float64 on the CPU."""
    unsteered, base = study.once(ends)
    return base - unsteered


def ends(study: Study) -> tuple[Float64[Tensor, " d_model"], Float64[Tensor, " d_model"]]:
    """z(0) and z(θ₀), between which the base's displacement a lies; float64 on the CPU."""
    unsteered, base = z_of(study, torch.stack([torch.zeros_like(study.base), study.base]))
    return unsteered, base


def spectrum(jacobian: Float64[Tensor, "d_model d_model"]) -> dict[str, float]:
    """Largest and median singular value, and effective rank exp(−Σ p log p), p = σ / Σσ (Roy and Vetterli 2007)."""
    sigma = torch.linalg.svdvals(jacobian)
    p = sigma / sigma.sum()
    rank = torch.exp(-(p * p.clamp_min(1e-300).log()).sum())
    return {"largest": float(sigma[0]), "median": float(sigma.median()), "effective_rank": float(rank)}


def best_at_norms(
    first: Map,
    taken: Float64[Tensor, "k d_model"],
    norms: list[float],
) -> list[tuple[Float64[Tensor, " d_model"], float]]:
    """For each norm r, x and ‖Jx − a‖ / ‖a‖ of the best x with ‖x‖ ≤ r, orthogonal to the orthonormal rows of `taken`.

    Golub-Kahan bidiagonalisation of J on the complement, started at a, with full reorthogonalisation.
    """
    jacobian, aim = first
    progress.passes += 1
    left, right, alphas, betas = [aim / aim.norm()], [], [], []
    for _ in range(min(_KRYLOV, len(aim) - len(taken))):
        v = jacobian.T @ left[-1]
        for _ in range(2):
            v = v - taken.T @ (taken @ v)
            if right:
                basis = torch.stack(right)
                v = v - basis.T @ (basis @ v)
        alphas.append(float(v.norm()))
        if alphas[-1] < 1e-10 * alphas[0]:
            alphas.pop()
            break
        right.append(v / v.norm())
        u, basis = jacobian @ right[-1], torch.stack(left)
        for _ in range(2):
            u = u - basis.T @ (basis @ u)
        betas.append(float(u.norm()))
        left.append(u / u.norm().clamp_min(1e-300))
    if not right:
        return [(torch.zeros_like(aim), 1.0) for _ in norms]
    steps = len(alphas)
    small = torch.zeros(steps + 1, steps, dtype=torch.float64)
    small[range(steps), range(steps)] = torch.tensor(alphas, dtype=torch.float64)
    small[range(1, steps + 1), range(steps)] = torch.tensor(betas, dtype=torch.float64)
    goal = torch.zeros(steps + 1, dtype=torch.float64)
    goal[0] = aim.norm()
    return [
        (torch.stack(right).T @ y, float((small @ y - goal).norm() / aim.norm())) for y in _bounded(small, goal, norms)
    ]


def _bounded(small: Tensor, goal: Tensor, norms: list[float]) -> list[Tensor]:
    """The least-squares solution of small·y = goal with ‖y‖ ≤ r, for each r: ridge, its μ by bisection of log μ."""
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    c, found = s * (u.T @ goal), []
    s2 = s.square().clamp_min(1e-20 * float(s[0]) ** 2)
    for r in norms:
        low, high = s2[0].log() - 60, s2[0].log() + 60
        if (c / s2).norm() > r:
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if (c / (s2 + middle.exp())).norm() > r else (low, middle)
            found.append(vh.T @ (c / (s2 + high.exp())))
        else:
            found.append(vh.T @ (c / s2))
    return found


def taken_before(study: Study, first: Map, chain: Vectors, kind: str) -> Float64[Tensor, "n d_model"]:
    """Orthonormal rows: those of `Study.taken`, then the directions that vectors of this kind take, one by one."""
    if kind == "linear":
        return linear_chain(study, first, chain)
    others = chain.theta if kind == "chain" else more_directions(study, chain.index).theta
    return torch.linalg.qr(torch.cat([study.taken, others.double()]).T).Q.T.contiguous()


def linear_chain(study: Study, first: Map, chain: Vectors) -> Float64[Tensor, "n d_model"]:
    """`Study.taken` and the directions that the linear chain takes, orthonormal; it ends where its loss is 0.999."""
    own = study.taken
    for norm in chain.norms[: len(own.T) - len(own) - 1]:
        ((x, loss),) = best_at_norms(first, own, [norm])
        if loss > _NOTHING_LEFT:
            break
        own = torch.cat([own, normalize(x - own.T @ (own @ x), dim=0)[None]])
    return own


def rows_beside(
    study: Study, first: Map, chain: Vectors, places: list[int], kind: str, taken: Float64[Tensor, "n d_model"]
) -> list[Row]:
    """The rows of a kind beside the vectors at `places` of the chain."""
    if not places:
        return []
    jacobian, aim = first
    norms, own = chain.norms, len(study.taken)
    best = [best_at_norms(first, taken[: own + place], [norms[place], study.radius]) for place in places]
    solutions = torch.stack([at_norm[0] for (at_norm, _) in best]).float()
    kls, losses = [row["kl_from_base"] for row in next_token(study, solutions)], real_losses(study, solutions)
    of_places = chain.theta[places]
    found, half, mirrored = real_losses(study, of_places), shares(study, of_places, 0.5), shares(study, of_places, -1)
    rows = []
    for i, place in enumerate(places):
        theta, of_chain = chain.theta[place].double(), kind == "chain"
        x = best[i][0][0]
        cos = float(theta @ x / (theta.norm() * x.norm()).clamp_min(1e-30))
        columns = {
            "norm": norms[place],
            "relative_loss": found[i] if of_chain else None,
            "linear_loss": best[i][0][1],
            "linear_loss_at_radius": best[i][1][1],
            "found_linear_loss": float((jacobian @ theta - aim).norm() / aim.norm()) if of_chain else None,
            "first_order": float((jacobian @ theta) @ aim / aim.square().sum()) if of_chain else None,
            "cos": cos if of_chain else None,
            "mirrored_share": mirrored[i] if of_chain else None,
            "half_share": half[i] if of_chain else None,
            "solution_loss": losses[i],
            "kl_from_base": kls[i],
        }
        rows.append(study.row(kind, chain.index[place], **columns))
    return rows


def real_losses(study: Study, thetas: Float[Tensor, "n d_model"]) -> list[float]:
    """‖z(θ) − z(θ₀)‖ / ‖z(0) − z(θ₀)‖ of each vector."""
    unsteered, base = study.once(ends)
    return ((z_of(study, thetas) - base).norm(dim=-1) / (base - unsteered).norm()).tolist()


def shares(study: Study, thetas: Float[Tensor, "n d_model"], factor: float) -> list[float]:
    """(z(factor θ) − z(0))·a / (z(θ) − z(0))·a of each vector, a = z(θ₀) − z(0)."""
    unsteered, base = study.once(ends)
    scaled, whole = ((z_of(study, part) - unsteered) @ (base - unsteered) for part in (thetas * factor, thetas))
    return (scaled / whole).tolist()


@torch.no_grad()
def z_of(study: Study, thetas: Float[Tensor, "n d_model"]) -> Float64[Tensor, "n d_model"]:
    """z(θ) of each vector on the training prompt, float64 on the CPU."""
    slice_ = study.once(slice_of)
    parts = thetas.split(max(1, PASS_TOKENS // int(slice_.lengths[0])))
    return torch.cat(
        [slice_.z(part.to(study.model.device), z_from=study.config.z_from).double().cpu() for part in parts]
    )
