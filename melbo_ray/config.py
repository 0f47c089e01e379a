"""The options, each defined once with its type, unit, default and meaning, for command line, TOML files and `run.json`.

Options form groups, so that a function takes only the options that it reads; `Config` combines all groups.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_split)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TimesR = Annotated[str, Field(pattern=r"^([1-9]\d*(\.\d+)?|0\.\d*[1-9]\d*)R$")]
"""A norm as a multiple of R, such as 2R."""


class _Options(BaseSettings):
    model_config = SettingsConfigDict(
        use_attribute_docstrings=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: Any,
        env_settings: Any,
        dotenv_settings: Any,
        file_secret_settings: Any,
    ) -> tuple:
        """Read the command line and the TOML file only: an environment variable named SEED must not change a study."""
        return (init_settings,)


class StudyOptions(_Options):
    """Options of what is studied."""

    config: str | None = Field(default=None, exclude=True)
    """TOML file that sets any of these options, or the name of a preset (`smollm2`: a prompt that suits the embedded
    model); the command line overrides it."""
    concepts: Names = ["code"]
    """Concepts to study, comma-separated: `code`, `alien`, `stem`, `jailbreak`, or paths of TOML files."""
    prompt: str | None = None
    """Training prompt of every chain, instead of each concept's own."""


class ModelOptions(_Options):
    """Options of the model: its weights, how they are loaded, and its source and target layers."""

    model: str = "smollm2"
    """Model: hub id, local directory, GGUF file, or `smollm2` (SmolLM2-135M-Instruct, installed with the package)."""
    revision: str | None = None
    """Revision of a hub model: branch, tag or commit."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Dtype of the weights; vectors, basis and loss are always float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device: `auto` (CUDA if available), `cpu`, or `cuda`."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own Python code."""
    layers: str | None = None
    """Dotted path of the decoder layers within the network, such as `model.layers`, if they are not found
    automatically."""

    source_layer: NonNegativeInt = 8
    """Source layer, to whose output θ is added; counted from 0. Where neither layer is given and the model has no layer
    16, source and target are the layers at a third and two thirds of its depth."""
    target_layer: NonNegativeInt = 16
    """Target layer, whose output is compared; counted from 0."""

    @model_validator(mode="after")
    def _check(self) -> "ModelOptions":
        if self.source_layer >= self.target_layer:
            raise ValueError(
                f"source layer {self.source_layer} is not below target layer {self.target_layer}: "
                "choose source < target"
            )
        return self


class SeedOptions(_Options):
    """The seed of all random draws."""

    seed: NonNegativeInt = 0
    """Random seed; the seed of every draw derives from (seed, concept, index, purpose)."""


class AnswerOptions(_Options):
    """Options of prompting and of text generation."""

    system_prompt: str = "default"
    """System turn: `default` (the chat template's own), `none`, or its text."""
    max_new_tokens: PositiveInt = 48
    """Maximum length of a generated text, tokens."""


class BaseOptions(SeedOptions, AnswerOptions):
    """Options of the search for the base vector (`base_vector`)."""

    radius: Positive | Literal["auto"] = "auto"
    """R, norm of the base vector (residual-stream units); `auto` calibrates it to the norm at which the effect of
    random vectors at the target layer departs from its linear part by three tenths, and keeps the norms of vectors from
    a file."""
    base: str = "melbo"
    """Base vector: `melbo`; `promotion` (gradient ascent on the log-probability of the concept's continuations);
    `contrast` (mean differences of concept and neutral prompts); `power/8` (that many leading right singular vectors
    of the slice's Jacobian, with both signs; `power`: half of `candidates`); a .jsonl file of pairs of prompts,
    `positive` and `negative` (mean differences); a file of vectors (docs/formats.md); or vectors of another run:
    `URL#concept/index`, `URL#concept/mean` of its chain, `URL#concept` for all; without a concept, of the one under
    study."""
    orthogonal_to: str | None = None
    """Directions to which the chain is orthogonal, besides the base: as for `base`, but `melbo` and `promotion`."""
    base_index: NonNegativeInt | None = None
    """Index of the base among the candidates or the rows of the file; by default the texts under each decide."""
    candidates: PositiveInt = 20
    """Number of MELBO candidates optimised at once, each orthogonal to the earlier ones; if none shows the concept
    firmly, up to two further sets follow."""
    melbo_steps: PositiveInt = 60
    """Maximum gradient-ascent steps per MELBO candidate; every ten steps the candidates are judged by their texts."""
    melbo_p: Positive = 2.0
    """MELBO's p, exponent of the norm over token positions."""
    melbo_q: Positive = 2.0
    """MELBO's q, root of the sum over d_model."""
    melbo_start: Literal["random", "power"] = "random"
    """Start of MELBO's ascent: seeded random vectors, or the slice's leading singular vectors, its maxima at small
    norm."""
    melbo_from: NonNegativeInt = 1
    """First token position in MELBO's norm; 0 includes the first position, which often is an attention sink."""


class ChainOptions(SeedOptions):
    """Options of the search for a chain (`chain`)."""

    z_from: NonNegativeInt = 1
    """First token position in z, the mean that a chain matches; the post uses 0. The first position often is an
    attention sink, whose massive activation then dominates the loss."""
    num_vectors: PositiveInt = 24
    """Number of vectors to find per concept, at most d_model - 1."""
    block: PositiveInt = 1
    """Number of mutually orthogonal vectors optimised jointly: faster, with a higher loss (docs/benchmarks.md)."""
    solver: Literal["lbfgs", "adam"] = "lbfgs"
    """Optimiser: `lbfgs` within the orthogonal complement, or the post's `adam`, projected after each step."""
    max_evaluations: PositiveInt = 30
    """Maximum loss-and-gradient evaluations per vector (exact number for `adam`; the post uses 1000)."""
    tolerance: NonNegativeFloat = 1e-3
    """Relative decrease of the loss over ten evaluations below which `lbfgs` stops; 0 disables early stopping."""
    norm_penalty: NonNegativeFloat = 0.0
    """λ of the penalty λ·‖θ‖ added to the loss."""
    max_norm: Positive | TimesR | None = None
    """Maximum ‖θ‖ (residual-stream units), or a multiple of the base's norm R such as `2R`; unlimited by default."""
    min_norm: NonNegativeFloat = 0.1
    """Norm at or below which a vector ends its chain (residual-stream units)."""
    max_relative_loss: Positive = 1.0
    """Loss relative to the unsteered model at or above which a vector ends its chain, as it has no effect left."""

    @property
    def limit(self) -> float | None:
        """`max_norm` in residual-stream units, of options that are not in multiples of R (`at`)."""
        return None if self.max_norm is None else float(self.max_norm)

    def at(self, radius: float) -> Self:
        """These options for a base of norm R = `radius`: `max_norm` in residual-stream units."""
        if not isinstance(self.max_norm, str):
            return self
        return self.model_copy(update={"max_norm": float(self.max_norm.removesuffix("R")) * radius})


class EvaluationOptions(AnswerOptions):
    """Options of the evaluations."""

    evals: Names = ["all"]
    """Evaluations to run, comma-separated: `all`, `why` (why the vectors do the same, not in `all`), or names."""
    sample: PositiveInt | None = None
    """Number of vectors, evenly spread over the chain, that the per-vector evaluations other than `kl` and `greedy`
    cover; by default the whole chain."""
    eval_products: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Products of the model's layers in the evaluations of logits and texts (`kl`, `greedy`, `generations`,
    `generalization`, `dose`, `rescaled`, `composition`, and in the nulls of these): `float32`, `tf32` on a GPU, or
    `bfloat16` on a CPU with AVX-512 BF16 or AMX; the error in KL is measured and told. All else is float32."""
    eval_batch: PositiveInt = 8
    """Number of vectors per evaluation unit."""
    samples: PositiveInt = 1
    """Number of texts sampled per vector, prompt and scale, besides the greedy one."""
    held_out_generations: NonNegativeInt = 3
    """Number of held-out prompts for generated texts, besides the training prompt."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 means greedy texts only."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Top-p (nucleus) sampling: sample from the smallest set of tokens with at least this total probability."""


class ClusterOptions(_Options):
    """Options of the actors on a cluster."""

    min_evaluators: PositiveInt = 1
    """Minimum number of evaluators."""
    max_evaluators: PositiveInt | None = None
    """Maximum number of evaluators; by default as many as fit on the cluster."""
    eval_gpus: NonNegativeFloat | None = None
    """GPUs per evaluator: 0.25 puts four on one GPU; above 1 the model's layers are spread over them; 0 means the CPU.
    By default as many share a GPU as its memory holds, at most four."""
    chain_gpus: NonNegativeFloat | None = None
    """GPUs per chain actor, at most 1; 0 means the CPU. The default is 1, or on a cluster with one GPU what its memory
    takes of it."""


class Config(ClusterOptions, EvaluationOptions, ChainOptions, BaseOptions, ModelOptions, StudyOptions):
    """All options of a study: model, concepts, base, chain, evaluations, cluster and storage.

    `Config` derives from every group, so it can be passed wherever a group is expected.
    """

    plan: bool = False
    """Print the estimated memory, GPUs, time and storage, and exit."""

    storage: str = "runs"
    """Directory or fsspec URL that holds the runs, such as s3://bucket/prefix."""
    run_id: str | None = None
    """Name of the run; an existing run is resumed. The default combines concepts, model and time."""
