"""Every family of decoder-only models in transformers, made tiny, and five checks of it against plain transformers."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from melbo_ray.config import Config
from melbo_ray.errors import UserError, first_line
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.partial import lower, lower_fingerprint, sketch
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts, continuation_score, encode
from tests.families import END, byte_tokenizer, directions
from tests.shrinking import sizes

SOURCE, TARGET = 1, 2
PROMPTS = ["How are you?", "How long is this one, by far longer?"]
FORCED = ["def f(x)", "I am", "x"]
# Of the largest value; float32 in another order of sums stays two decades below.
_TOLERANCE = 1e-3
_SLOWER = ("costs time only", "read the whole model")
_OTHER_TEXTS = (
    "transformers' generate fails or differs from its own forward passes, which are what ours are compared with"
)
LAYERS = {"hrm_text": "model.H_module.layers", "longcat_flash": "model.layers"}
"""Where the decoder layers of families are that do not show it by their number."""
Cell = dict[str, Any]


def families() -> list[str]:
    """Model types of transformers that are decoders of text alone; an alias of another is left out."""
    kinds = {name: CONFIG_MAPPING[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return [name for name, kind in kinds.items() if kind.model_type == name and _of_text_alone(kind)]


def _of_text_alone(kind: Any) -> bool:
    """Whether a model of this configuration is no part of one that encodes, or that sees, hears or speaks."""
    parts = " ".join(kind.sub_configs)
    return not kind.is_encoder_decoder and not any(word in parts for word in ("text", "vision", "audio", "coder"))


def tiny(family: str) -> LanguageModel:
    """A model of this family with random weights, the same at every call."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = CONFIG_MAPPING[family](**sizes(family, CONFIG_MAPPING[family]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # What begins as 0 or 1 (gates, norms) would hide what goes wrong in it.
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    network.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=257)
    return LanguageModel.wrap(network, byte_tokenizer(), name=f"tiny-{family}", layers=LAYERS.get(family))


def judge(family: str) -> dict[str, Cell]:
    """For each of `CHECKS` a `verdict` (exact, plain way, refused or wrong) and lines that say `why` not exact."""
    try:
        model = tiny(family)
    except UserError as refusal:
        return {name: {"verdict": "refused", "why": [str(refusal)]} for name in CHECKS}
    # What transformers cannot read is no model to check, and raises.
    model.network(input_ids=_tokens(model)[0][None], use_cache=False)
    return {name: _cell(check, model) for name, check in CHECKS.items()}


def _cell(check: Callable[[LanguageModel], float], model: LanguageModel) -> Cell:
    model.kept.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            error = check(model)
        except UserError as refusal:
            return {"verdict": "refused", "why": [str(refusal)]}
        # Whatever else is raised is what a user would run into.
        except Exception as error:
            return {"verdict": "wrong", "why": [f"{type(error).__name__}: {first_line(error)}"]}
    if not error <= _TOLERANCE:
        return {"verdict": "wrong", "why": [f"off by {error:.0e}"]}
    said = sorted({str(warning.message) for warning in told})
    slower = [line for line in said if any(part in line for part in _SLOWER)]
    notes = [line for line in said if line == _OTHER_TEXTS]
    return {"verdict": "plain way" if slower else "exact", "why": slower + notes}


def check_slice(model: LanguageModel) -> float:
    """The target layer's stream, the loss and its gradient, on prompts of two lengths, each under a θ of its own."""
    tokens, thetas, goal = _tokens(model), _thetas(model), _thetas(model, seed=9)
    rows = torch.tensor([1, 0])
    slice = Slice(model, tokens, SOURCE, TARGET)
    errors = []
    ours = slice.h_target(thetas, rows)
    losses, gradients = slice.value_and_grad(thetas, goal, rows)
    for i, row in enumerate(rows.tolist()):
        free = thetas[i].clone().requires_grad_()
        with _steered(model, free), _capturing(model.layers[TARGET]) as found:
            model.network(input_ids=tokens[row][None], use_cache=False)
        loss = (found[0][0].mean(0) - goal[i]).norm()
        loss.backward()
        errors += [_error(ours[i, : len(tokens[row])], found[0][0]), _error(losses[i], loss)]
        errors.append(_error(gradients[i], free.grad))  # ty: ignore[invalid-argument-type]
    return _worst(errors)


def check_logits(model: LanguageModel) -> float:
    """The next token's logits under a vector a row, and under one for prompts with a common beginning."""
    tokens, thetas = _tokens(model), _thetas(model)
    prompts = Prompts(model, tokens, SOURCE)
    pairs = [(0, 0), (1, 1), (1, 0)]
    rows, which = (torch.tensor(part) for part in zip(*pairs, strict=True))
    ours = [*prompts.logits(thetas[which], rows), *prompts.under(thetas[0])]
    plain = [_logits(model, tokens[row], thetas[i])[-1] for row, i in [*pairs, (0, 0), (1, 0)]]
    return _worst(_error(own[0], other) for own, other in zip(ours, plain, strict=True))


def check_scores(model: LanguageModel) -> float:
    """Scores of several continuations, steered minus unsteered."""
    tokens, thetas = _tokens(model)[1], _thetas(model)
    ours = continuation_score(model, tokens, FORCED, SOURCE, thetas)

    def plain(theta: torch.Tensor) -> torch.Tensor:
        parts = []
        for text in FORCED:
            forced = encode(model, text)
            logits = _logits(model, torch.cat([tokens, forced]), theta)[len(tokens) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(-1, forced[:, None])[:, 0])
        return torch.cat(parts).mean()

    unsteered = plain(torch.zeros(model.d_model))
    return _worst(_error(own, plain(theta) - unsteered) for own, theta in zip(ours, thetas, strict=True))


def check_texts(model: LanguageModel) -> float:
    """Greedy texts, token for token, in a batch that is refilled: 0 or 1."""
    thetas = directions(4, norm=3.0, d_model=model.d_model, seed=2)
    prompts = [*_tokens(model), *_tokens(model)]
    requests = [Request(tokens, theta, temperature=0.0) for tokens, theta in zip(prompts, thetas, strict=True)]
    ours = generate(model, requests, SOURCE, max_new_tokens=8, slots=3)
    passes = [_read(model, request, 8) for request in requests]
    try:
        plain = [_greedy(model, request, 8) for request in requests]
    # A family's own cache may not suit its own sizes (xLSTM).
    except (RuntimeError, ValueError):
        plain = []
    if plain != passes:
        # RoBERTa's kind counts positions from the padding token's number on, and `generate` does not.
        warnings.warn(_OTHER_TEXTS, stacklevel=1)
        plain = passes
    return float(any(own.tokens != other for own, other in zip(ours, plain, strict=True)))


def check_fingerprint(model: LanguageModel) -> float:
    """The fingerprint and the lower part of what is stored: those of the whole, at every load; 0 or 1."""
    with tempfile.TemporaryDirectory() as folder:
        model.network.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        layers = LAYERS.get(model.name.removeprefix("tiny-"))
        config = Config(model=folder, layers=layers, source_layer=SOURCE, target_layer=TARGET, device="cpu")
        one, two = (LanguageModel.load(folder, device="cpu", layers=layers) for _ in range(2))
        part, shape = lower(config), sketch(config)
    same = one.fingerprint() == two.fingerprint()
    same = same and lower_fingerprint(one, TARGET + 1) == lower_fingerprint(part, TARGET + 1)
    same = same and _sizes(shape) == _sizes(one) and len(shape.layers) == len(one.layers)
    z = [Slice(each, _tokens(each), SOURCE, TARGET).z(_thetas(each)) for each in (one, part)]
    same = same and torch.equal(*z)
    with torch.no_grad():
        next(one.layers[TARGET].parameters()).view(-1)[0] += 1
    changed = one.fingerprint() != two.fingerprint()
    changed = changed and lower_fingerprint(one, TARGET + 1) != lower_fingerprint(part, TARGET + 1)
    return float(not (same and changed))


def _sizes(model: LanguageModel) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.network.state_dict().items()}


CHECKS: dict[str, Callable[[LanguageModel], float]] = {
    "slice": check_slice, "logits": check_logits, "scores": check_scores, "texts": check_texts,
    "fingerprint": check_fingerprint,
}  # fmt: skip


def _tokens(model: LanguageModel) -> list[torch.Tensor]:
    return [model.tokenize(prompt) for prompt in PROMPTS]


def _thetas(model: LanguageModel, seed: int = 1) -> torch.Tensor:
    return directions(2, norm=3.0, d_model=model.d_model, seed=seed)


@contextlib.contextmanager
def _steered(model: LanguageModel, theta: torch.Tensor) -> Generator[None]:
    def add(_layer: Any, _args: Any, output: Any) -> Any:
        return (output[0] + theta, *output[1:]) if isinstance(output, tuple) else output + theta

    handle = model.layers[SOURCE].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _capturing(layer: torch.nn.Module) -> Generator[list[torch.Tensor]]:
    found: list[torch.Tensor] = []
    handle = layer.register_forward_hook(
        lambda _layer, _args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def _logits(model: LanguageModel, tokens: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    with _steered(model, theta):
        return model.network(input_ids=tokens[None], use_cache=False).logits[0]


def _greedy(model: LanguageModel, request: Request, limit: int) -> list[int]:
    """The text of transformers' own `generate` with a hook, without the end token."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=END, pad_token_id=257)
    seen = torch.ones(1, len(request.tokens)).long()
    with _steered(model, request.theta):
        ids = model.network.generate(request.tokens[None], attention_mask=seen, generation_config=settings)  # ty: ignore[not-callable]
    return [token for token in ids[0, len(request.tokens) :].tolist() if token != END]


def _read(model: LanguageModel, request: Request, limit: int) -> list[int]:
    """The same from a pass over everything for each token."""
    tokens = request.tokens
    while len(tokens) < len(request.tokens) + limit:
        token = _logits(model, tokens, request.theta)[-1].argmax()
        if token == END:
            break
        tokens = torch.cat([tokens, token[None]])
    return tokens[len(request.tokens) :].tolist()


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _worst(errors: list[float] | Iterator[float]) -> float:
    """The largest; NaN where there is one."""
    return float(torch.tensor(list(errors)).max())
