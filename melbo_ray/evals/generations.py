"""Texts under each vector, greedy and sampled, with their concept scores."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from melbo_ray.concepts.detectors import score_text
from melbo_ray.evals.context import TRAINING, Row, Rows, Study, Vectors
from melbo_ray.evals.kl import at_norm
from melbo_ray.model.sampling import Continuation, Request, generate
from melbo_ray.seeds import derive_seed


def run(study: Study, vectors: Vectors) -> Rows:
    """Generate continuations of the training prompt and of the first held-out prompts, each vector at its own norm.

    On the training prompt each vector is also used at the radius. Sample 0 is greedy (temperature 0), samples 1 …
    `samples` are drawn; the evaluation `greedy` writes the greedy text at the own norm. The seed of a row derives from
    its keys, so that every text can be reproduced alone.
    """
    study = study.rounded
    held_out = list(study.concept.held_out)[: study.config.held_out_generations]
    wanted = [("own", prompt_id, vectors.theta) for prompt_id in (TRAINING, *held_out)]
    if vectors.kind != "unsteered":
        wanted.append(("radius", TRAINING, at_norm(vectors.theta, study.radius)))
    keys, thetas = [], []
    for scale, prompt_id, scaled in wanted:
        for index, theta in zip(vectors.index, scaled, strict=True):
            for sample in range(1 + (study.config.samples if study.config.temperature else 0)):
                if (prompt_id, scale, sample) != (TRAINING, "own", 0):
                    keys.append({"index": index, "prompt_id": prompt_id, "scale": scale, "sample": sample})
                    thetas.append(theta)
    return rows_of_texts(study, vectors.kind, keys, thetas)


def rows_of_texts(study: Study, kind: str, keys: Sequence[Row], thetas: Sequence[Float[Tensor, " d_model"]]) -> Rows:
    """Rows of `generations` with the texts of `write`."""
    texts = write(study, kind, keys, thetas)
    return {"generations": [study.row(kind, **key, **text) for key, text in zip(keys, texts, strict=True)]}


def write(
    study: Study,
    kind: str,
    keys: Sequence[Row],
    thetas: Sequence[Float[Tensor, " d_model"]],
    ablated: Sequence[Float[Tensor, " d_model"] | None] | None = None,
) -> list[Row]:
    """Generate a continuation of the prompt keys[i]["prompt_id"] under thetas[i], with a seed derived from keys[i].

    It is greedy if keys[i]["sample"] is 0, otherwise sampled. `ablated` is as in `Request`.
    """
    config, concept = study.config, study.concept
    requests = []
    for key, theta, unit in zip(keys, thetas, ablated or [None] * len(keys), strict=True):
        purpose = "/".join(["generations", kind, *(str(value) for name, value in key.items() if name != "index")])
        seed = derive_seed(config.seed, concept.name, key["index"], purpose)
        temperature = 0.0 if key.get("sample") == 0 else config.temperature
        requests.append(Request(study.tokens(key["prompt_id"]), theta, seed, unit, temperature))
    texts = generate(
        study.model, requests, config.source_layer, max_new_tokens=config.max_new_tokens, top_p=config.top_p
    )
    return [_row(study, request.temperature, text) for request, text in zip(requests, texts, strict=True)]


def _row(study: Study, temperature: float, continuation: Continuation) -> Row:
    text = str(study.model.tokenizer.decode(continuation.tokens, skip_special_tokens=True))
    return {
        "temperature": temperature,
        "text": text,
        "num_tokens": len(continuation.tokens),
        "finish_reason": continuation.finish_reason,
        **score_text(study.concept, text),
    }
