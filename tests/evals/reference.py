"""The figures again, slowly: transformers with a hook, one vector at a time, numpy in float64."""

import numpy as np
import torch
from scipy.special import log_softmax, rel_entr

from melbo_ray.evals.control import more_directions
from melbo_ray.seeds import derive_seed
from tests.families import plain_hidden_states, plain_logits


def log_probs(study, tokens, theta):
    """Log-probabilities at every position, (seq, vocab) float64."""
    logits = plain_logits(study.model, tokens, study.config.source_layer, theta)
    return log_softmax(logits.double().numpy(), axis=-1)


def prompt_tokens(study, text=None):
    return study.model.tokenize(text or study.concept.prompt, study.config.system_prompt)


def next_token(study, theta, text=None):
    return log_probs(study, prompt_tokens(study, text), theta)[-1]


def kl(log_p, log_q):
    return float(rel_entr(np.exp(log_p), np.exp(log_q)).sum())


def divergences(study, theta):
    here, base = next_token(study, theta), next_token(study, study.base)
    unsteered = next_token(study, torch.zeros_like(theta))
    return {"kl_from_base": kl(here, base), "kl_to_base": kl(base, here), "kl_from_unsteered": kl(here, unsteered)}


def forced(study, prompt, continuation, theta):
    """Log-probabilities where each token of the continuation is predicted, and the tokens' own."""
    tokens = torch.cat([prompt, torch.tensor(continuation)])
    rows = log_probs(study, tokens, theta)[len(prompt) - 1 : -1]
    return rows, rows[np.arange(len(continuation)), continuation]


def written(study, tokens, theta, seed, length, greedy=False):
    """The likeliest token, or inverse-CDF sampling, from plain forward passes, the whole text read again each time."""
    found = []
    for draw in torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist():
        probabilities = np.exp(log_probs(study, torch.cat([tokens, torch.tensor(found).long()]), theta)[-1])
        drawn = np.searchsorted(np.cumsum(probabilities), draw, side="right")
        token = int(probabilities.argmax() if greedy else drawn)
        if token in study.model.end_tokens:
            break
        found.append(token)
    return found


def concept_score(study, theta):
    prompt, total = prompt_tokens(study), []
    for text in study.concept.continuations:
        ids = study.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        total.append(forced(study, prompt, ids, theta)[1] - forced(study, prompt, ids, torch.zeros_like(theta))[1])
    return float(np.concatenate(total).mean())


def rows_of(table, **keys):
    """The rows of an Arrow table with these values, as dictionaries."""
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in keys.items())]


def streams(study, tokens, theta):
    """The output of every layer, (layers, seq, d_model) float64."""
    outputs, _ = plain_hidden_states(study.model, tokens, study.config.source_layer, theta)
    return np.stack([output[0].double().numpy() for output in outputs])


def cos(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def profile(h, other):
    return h @ other.numpy() / np.linalg.norm(h, axis=-1) / np.linalg.norm(other)


def null_of(study, index, norm):
    return more_directions(study, [index]).theta[0] * norm / study.radius


def z_of(study, theta):
    """z(θ), from transformers and a hook in float64."""
    study.model.network.double()
    try:
        outputs, _ = plain_hidden_states(study.model, prompt_tokens(study), study.config.source_layer, theta.double())
    finally:
        study.model.network.float()
    return outputs[study.config.target_layer][0][study.config.z_from :].mean(0).numpy()


def part_along(study, theta):
    """(z(θ) − z(0))·a / ‖a‖², a = z(θ₀) − z(0), from transformers and a hook in float64."""
    unsteered = z_of(study, torch.zeros_like(study.base))
    aim = z_of(study, study.base) - unsteered
    return float((z_of(study, theta) - unsteered) @ aim / (aim @ aim))


def source_stream(study, tokens):
    """The unsteered stream after the source layer, (seq, d_model) float64."""
    with torch.no_grad():
        return (
            study.model.network(tokens[None], output_hidden_states=True)
            .hidden_states[study.config.source_layer + 1][0]
            .double()
            .numpy()
        )


def read(study, texts):
    """The stream on these texts, all tokens."""
    return np.concatenate(
        [source_stream(study, torch.tensor(study.model.tokenizer(text)["input_ids"])) for text in texts]
    )


def without_sinks(h):
    """The tokens whose norm is at most three times the median."""
    norms = np.linalg.norm(h, axis=1)
    return h[norms <= 3 * np.median(norms)]


def written_sets(study):
    """The stream on what the unsteered model writes: after an opening of the concept, and on its own."""
    found = {"concept": [], "neutral": []}
    for i, text in enumerate(study.concept.held_out.values()):
        prompt = prompt_tokens(study, text)
        for side, start in {"concept": torch.cat([prompt, study.continuations[i % 2]]), "neutral": prompt}.items():
            seed = derive_seed(study.config.seed, "code", i, f"presence/{side}")
            own = written(study, start, torch.zeros_like(study.base), seed, 32) or study.model.end_tokens[:1]
            found[side].append(source_stream(study, torch.cat([start, torch.tensor(own)]))[len(start) :])
    return [np.concatenate(side) for side in found.values()]


def relative_loss(study, theta):
    """‖z(θ) − z(θ₀)‖ / ‖z(0) − z(θ₀)‖, from transformers and a hook in float64."""
    base = z_of(study, study.base)
    return np.linalg.norm(z_of(study, theta) - base) / np.linalg.norm(z_of(study, torch.zeros_like(study.base)) - base)
