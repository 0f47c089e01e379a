"""A run's model with its vectors: texts and next tokens under each, its base, a random direction and nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from melbo_ray.errors import UserError
from melbo_ray.evals.control import random_direction
from melbo_ray.model.kv_cache import Request
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.sampling import written
from melbo_ray.model.steering import kl
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.vectors import RunVectors

NAMES = ("vector", "base", "random", "unsteered")
"""The directions of a `Stage`."""
TOP = 10
"""Number of next tokens with their probabilities."""


@dataclass(frozen=True)
class NextTokens:
    """The next-token distribution after a prompt, which comes before the text.

    Attributes:
        name: the direction, one of `NAMES`.
        tokens: the likeliest tokens as text, with their probabilities.
        kl_from_base: KL(P‖P_base), nats.
    """

    name: str
    tokens: list[tuple[str, float]]
    kl_from_base: float


@dataclass(frozen=True)
class Text:
    """A text so far.

    Attributes:
        name: the direction, one of `NAMES`.
        text: all of it up to here.
        finish_reason: empty while it grows, then `stop` or `length`.
    """

    name: str
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Stage:
    """A run and its model.

    Attributes:
        url: folder of the run.
        manifest: its manifest.
        model: its model.
        vectors: base and chain by concept; concepts without a base are absent.
    """

    url: str
    manifest: Manifest
    model: LanguageModel
    vectors: Mapping[str, RunVectors]
    _random: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, url: str, model: str | None = None, device: str = "auto") -> "Stage":
        """Load a run's vectors and its model, which lies at `model` if it has moved.

        Raises:
            UserError: no run or no vectors, no such model, or one of another width or of fewer layers.
        """
        run = Run(url)
        manifest = run.manifest()
        if manifest is None:
            raise UserError(f"no run at {run.storage.url}: expected run.json there")
        vectors = {}
        for concept in manifest.definitions or manifest.concepts:
            if len(run.read("vectors", concept)):
                vectors[concept] = run.vectors(concept)
        if not vectors:
            raise UserError(f"{run.storage.url} has no base vector yet: resume the run")
        config = manifest.config
        options: dict[str, Any] = {
            key: config[key] for key in ("dtype", "layers", "trust_remote_code") if key in config
        }
        revision = None if model else manifest.revision
        loaded = LanguageModel.load(model or str(config["model"]), revision=revision, device=device, **options)
        stage = cls(run.storage.url, manifest, loaded, vectors)
        stage._check()
        return stage

    def _check(self) -> None:
        (layer, *_), width = (
            {v.site.layer for v in self.vectors.values()},
            next(iter(self.vectors.values()))[0].theta.size,
        )
        if width != self.model.d_model or layer >= len(self.model.layers):
            raise UserError(
                f"the vectors have {width} entries and act at layer {layer}; {self.model.name!r} has d_model "
                f"{self.model.d_model} and {len(self.model.layers)} layers: give the model that the run was made on"
            )
        # A chat template may insert the date, so the training prompts stay as the run rendered them.
        kept = self.model.kept.setdefault("rendered", {})
        for concept, prompts in self.manifest.prompts_rendered.items():
            if "training" in prompts:
                kept[self.prompt(concept), self._system] = prompts["training"].text

    @property
    def layer(self) -> int:
        """Source layer, to whose output vectors are added."""
        return next(iter(self.vectors.values())).site.layer

    @property
    def _system(self) -> str:
        return str(self.manifest.config.get("system_prompt", "default"))

    def prompt(self, concept: str) -> str:
        """The training prompt of a concept; empty if the manifest has none."""
        return self.manifest.prompts.get(concept, {}).get("training", "")

    def directions(self, concept: str, index: int, norm: float | None = None) -> dict[str, Float[Tensor, " d_model"]]:
        """θ by name: vector `index` and a random direction at `norm` (by default the vector's own), the base, and 0.

        The random direction is that of the run's evaluations: orthogonal to the base and to the chain before `index`.

        Raises:
            UserError: no such concept or vector.
        """
        if concept not in self.vectors:
            raise UserError(f"no vectors of concept {concept!r}: expected one of {', '.join(self.vectors)}")
        chosen = self.vectors[concept][index]
        norm = chosen.norm if norm is None else norm
        vector, base = (torch.tensor(v.theta) for v in (chosen, self.vectors[concept][0]))
        random = self._random_direction(concept, chosen.index)
        return {
            "vector": normalize(vector, dim=0) * norm,
            "base": base,
            "random": normalize(random, dim=0).float() * norm,
            "unsteered": torch.zeros_like(base),
        }

    def _random_direction(self, concept: str, index: int) -> Tensor:
        if (concept, index) not in self._random:
            taken = torch.tensor(self.vectors[concept][: max(1, index)].theta).double()
            basis = torch.linalg.qr(taken.T).Q.T
            self._random[concept, index] = random_direction(self.manifest.seed or 0, concept, index, basis)
        return self._random[concept, index]

    def write(
        self, prompt: str, directions: Mapping[str, Float[Tensor, " d_model"]], length: int
    ) -> Iterator[NextTokens | Text]:
        """The greedy text under each direction, token by token, after the next tokens of all.

        Args:
            prompt: what the user says, put into the chat template as the run does.
            directions: θ by name, among them `base`.
            length: maximum number of tokens.

        Raises:
            UserError: the prompt is empty or too long, or logits are not finite, as at a norm that is far too large.
        """
        tokens = self.model.tokenize(prompt, self._system)
        names = list(directions)
        requests = [Request(tokens, theta, temperature=0) for theta in directions.values()]
        steps = written(self.model, requests, self.layer, max_new_tokens=length, slots=len(requests))
        try:
            first = [next(steps) for _ in names]
            logs = [logits.float().log_softmax(-1) for _, logits in first]
            for name, log in zip(names, logs, strict=True):
                yield self._next_tokens(name, log, logs[names.index("base")])
            for generation, _ in first:
                yield self._text(names[generation.index], generation)
            for generation, _ in steps:
                yield self._text(names[generation.index], generation)
        except FloatingPointError as error:
            raise UserError(f"{error}: take a smaller norm") from None

    def _next_tokens(self, name: str, log: Tensor, base: Tensor) -> NextTokens:
        top = log.exp().topk(min(TOP, len(log)))
        texts = [str(self.model.tokenizer.decode([token])) for token in top.indices.tolist()]
        return NextTokens(name, list(zip(texts, top.values.tolist(), strict=True)), max(0.0, float(kl(log, base))))

    def _text(self, name: str, generation: Any) -> Text:
        text = str(self.model.tokenizer.decode(generation.tokens, skip_special_tokens=True))
        return Text(name, text, generation.finish_reason)
