"""The base that promotes a concept: gradient ascent on the log-probability of its continuations.

Source: promotion steering of Dunefsky and Cohan (2025), "One-shot optimized steering vectors mediate safety-relevant
behaviors in LLMs". MELBO finds what a model does by itself; this asks for one concept, on the training prompt, and so
has a base at a small norm for concepts that MELBO and mean differences of prompts do not elicit there.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.concepts.loader import Concept
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.steering import Prompts, encode, target_log_probs
from melbo_ray.search.stages import Once, compute

# As of MELBO's ascent.
_STEP, _MOMENTUM = 0.05, 0.7
_STEPS = 20


def promote(
    model: LanguageModel,
    prompt: Int[Tensor, " seq"],
    concept: Concept,
    source: int,
    norms: list[float],
    once: Once = compute,
) -> Iterator[Float[Tensor, "1 d_model"]]:
    """Maximise the mean log-probability per token of the continuations after the prompt, at each norm in turn.

    θ is added at every position of prompt and continuations. The ascent starts at the direction of the gradient at 0,
    which is best at a small norm, and at a further norm at what was found before; it is deterministic. A step follows
    the normalised tangent part of the gradient with momentum.
    """
    forced = Prompts(model, [prompt], source, [[encode(model, text) for text in concept.continuations]])
    theta = torch.zeros(model.d_model)
    for place, norm in enumerate(norms):

        def climb(start: Tensor = theta, norm: float = norm) -> Tensor:
            start = start if start.any() else gradient_of(forced, start)[1]
            theta, velocity = norm * normalize(start, dim=0), torch.zeros_like(start)
            for _ in range(_STEPS):
                _, gradient = gradient_of(forced, theta)
                velocity = _MOMENTUM * velocity + normalize(gradient - gradient @ theta / norm**2 * theta, dim=0)
                theta = norm * normalize(theta + _STEP * norm * velocity, dim=0)
            return theta

        theta = once(f"promotion-{place}", climb)
        yield theta[None]


def gradient_of(forced: Prompts, theta: Float[Tensor, " d_model"]) -> tuple[float, Float[Tensor, " d_model"]]:
    """The mean log-probability per token of a single prompt's continuations under θ, nats, and its gradient."""
    with torch.enable_grad():
        free = theta.detach().to(forced.model.device).requires_grad_()
        (logits,) = forced.chunk(free[None], torch.zeros(1, dtype=torch.long))
        value = target_log_probs(logits, forced.targets[0]).mean()
        (gradient,) = torch.autograd.grad(value, free)
    return value.item(), gradient.to(theta.device)
