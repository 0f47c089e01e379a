"""The solvers' matrix: bases x seeds x positions in the chain, the default beside the post's Adam (see bench.py).

Evaluations are counted and nothing is timed, so other processes may run beside it. The vectors before each position are
found by the default solver in few evaluations.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.reference import Bench, Row
from melbo_ray.concepts.detectors import score_text
from melbo_ray.concepts.loader import Concept, load_concept
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts, kl
from melbo_ray.search.base_vectors import base_vector
from melbo_ray.search.chain import Chain
from melbo_ray.search.lockstep import steps
from melbo_ray.search.solvers import Solution

BUDGETS = (20, 40, 80)
_BASES = (("code", "melbo"), ("jailbreak", "melbo"), ("code", "contrast"))
_SEEDS = {0: (1, 2, 4, 8, 100, 300), 1: (1, 100), 2: (1, 100)}
_STEPS = 300
# Evaluations for each vector that stands before a position: the subspace taken matters, not how well it was fitted.
_FILL = 5


@dataclass(frozen=True)
class Trace:
    """The trace of a solver.

    Attributes:
        losses: the least loss until each evaluation, relative to the unsteered one.
        norms: ‖θ‖ there (residual-stream units).
        thetas: θ there, (d_model,), after each of `BUDGETS` and at the end.
    """

    losses: list[float]
    norms: list[float]
    thetas: dict[int, Tensor]

    def until(self, loss: float) -> int | None:
        """Evaluations to a relative loss; None where it was not reached."""
        return next((n for n, value in enumerate(self.losses, 1) if value <= loss), None)


def solvers(bench: Bench) -> Iterator[Row]:
    """A row a cell: evaluations to the loss of 300 Adam steps; losses, norms, KL and text beside Adam's.

    At the first cell of each base to that of 1000 steps, too.
    """
    seeds = {0: (1,)} if bench.quick else _SEEDS
    for name, kind in _BASES:
        concept = load_concept(name)
        if bench.config.prompt:
            concept = concept.model_copy(update={"prompt": bench.config.prompt})
        for seed, positions in seeds.items():
            options = {"seed": seed, "base": kind, "radius": "auto", "max_evaluations": _FILL, "tolerance": 0.0}
            config = bench.config.model_copy(update={**options, "num_vectors": bench.model.d_model - 1})
            slice = bench.slice(bench.model.tokenize(concept.prompt, config.system_prompt))
            found = base_vector(slice, concept, config)
            chain = Chain(slice, 0, found.theta, config, name)
            for position in (position for position in positions if position < bench.model.d_model - 1):
                while chain.index < position:
                    chain.add(_trace(chain, config.solver, _FILL)[1])
                yield from _cells(bench, chain, concept, f"{name}, {kind}, seed {seed}, vector {position}")


def _cells(bench: Bench, chain: Chain, concept: Concept, case: str) -> Iterator[Row]:
    long = case.endswith("seed 0, vector 1") and not bench.quick
    goals = 30 if bench.quick else _STEPS
    (theirs, _), (ours, _) = _trace(chain, "adam", 1000 if long else goals), _trace(chain, "lbfgs", max(BUDGETS))
    shown = _shown(bench, chain, concept, ours, theirs)
    told = ", ".join(f"{ours.losses[n - 1]:.3f}" for n in BUDGETS)
    for count in sorted({goals, len(theirs.losses)}):
        goal = theirs.losses[count - 1]
        reached = ours.until(goal)
        norm = "–" if reached is None else f"{ours.norms[reached - 1] / theirs.norms[count - 1]:.2f}"
        note = f"{count} Adam steps: {goal:.3f}; ours after {BUDGETS}: {told}; norm at equal loss {norm}; {shown}"
        yield Row("solvers", case, math.nan if reached is None else reached, "evaluations", note=note)


def _trace(chain: Chain, solver: str, budget: int) -> tuple[Trace, Solution]:
    """Run a solver for the chain's next vector, without changing the chain; returns its trace and solution."""
    losses, norms, thetas, best = [], [], {}, float("inf")
    options = chain.options.model_copy(update={"solver": solver, "max_evaluations": budget})
    solution = None
    for step in steps({chain: chain.solver(options)}):
        loss = float(step.losses[0]) / chain.unsteered_losses[0]
        if loss < best:
            best, kept = loss, step.theta[0].cpu()
        losses.append(best)
        norms.append(float(kept.norm()))
        if len(losses) in (*BUDGETS, budget):
            thetas[len(losses)] = kept
        solution = step.solution
    assert solution is not None
    return Trace(losses, norms, thetas), solution


def _shown(bench: Bench, chain: Chain, concept: Concept, ours: Trace, theirs: Trace) -> str:
    """KL from the base over the unsteered one, and whether the greedy text shows the concept, ours and Adam's."""
    model, source, tokens = (
        bench.model,
        bench.config.source_layer,
        bench.model.tokenize(concept.prompt, bench.config.system_prompt),
    )
    budgets = [n for n in BUDGETS if n in ours.thetas]
    thetas = torch.stack([*(ours.thetas[n] for n in budgets), [*theirs.thetas.values()][-1]])
    rows = torch.cat([chain.base[None], torch.zeros_like(chain.base)[None], thetas])
    log_p = [logits[0].double().log_softmax(-1) for logits in Prompts(model, [tokens], source).logits(rows)]
    _, unsteered, *others = (float(kl(p, log_p[0])) for p in log_p)
    texts = generate(model, [Request(tokens, theta, temperature=0) for theta in thetas], source, max_new_tokens=48)
    marks = [score_text(concept, str(model.tokenizer.decode(text.tokens)))["detected"] for text in texts]
    told = [f"{value / unsteered:.0%}{'+' if mark else '-'}" for value, mark in zip(others, marks, strict=True)]
    return f"KL of unsteered, + shows: {', '.join(told[:-1])}; Adam {told[-1]}"
