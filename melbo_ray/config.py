"""Every option, once: type, unit, default, meaning. The command line, TOML files and `run.json` derive from it.

Options come in groups, so that a function takes those alone that it reads; `Config` is all of them.
"""

from typing import Annotated, Any, Literal

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
        """The command line and the TOML file are all: an environment variable named SEED changes no study."""
        return (init_settings,)


class StudyOptions(_Options):
    """What is studied."""

    config: str | None = Field(default=None, exclude=True)
    """TOML file that sets any of these options, or a preset by its name (`smollm2`: the embedded model's own prompt);
    the command line overrides it."""
    concepts: Names = ["code"]
    """Concepts to study, comma-separated: `code`, `alien`, `stem`, `jailbreak`, or paths of TOML files."""
    prompt: str | None = None
    """The prompt that the chains are trained on, instead of each concept's own."""


class ModelOptions(_Options):
    """Which model, how it is loaded, and between which of its layers vectors work."""

    model: str = "smollm2"
    """Hub id, local directory, GGUF file, or `smollm2` (SmolLM2-135M-Instruct, installed with the package)."""
    revision: str | None = None
    """Revision of a hub model: branch, tag or commit."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Type of the weights; vectors, basis and loss are float32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live: `auto` (CUDA where there is one), `cpu`, or `cuda`."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""
    layers: str | None = None
    """Where the decoder layers are inside the network, such as `model.layers`, for a model where they are not found."""

    source_layer: NonNegativeInt = 8
    """Layer after which θ is added, counted from 0."""
    target_layer: NonNegativeInt = 16
    """Layer whose output is compared, counted from 0."""

    @model_validator(mode="after")
    def _check(self) -> "ModelOptions":
        if self.source_layer >= self.target_layer:
            raise ValueError(
                f"source layer {self.source_layer} is not below target layer {self.target_layer}: "
                "choose source < target"
            )
        return self


class SeedOptions(_Options):
    """What every random draw goes by."""

    seed: NonNegativeInt = 0
    """The one seed; every random draw derives from (seed, concept, index, purpose)."""


class AnswerOptions(_Options):
    """How the model is asked, and how long it answers."""

    system_prompt: str = "default"
    """System turn: `default` (what the chat template puts there), `none`, or its text."""
    max_new_tokens: PositiveInt = 48
    """Length of a sampled continuation, tokens."""


class BaseOptions(SeedOptions, AnswerOptions):
    """How the base vector is found (`base_vector`)."""

    radius: Positive | Literal["auto"] = "auto"
    """R, norm of the base vector (residual-stream units); `auto` calibrates it: the norm at which a random vector's
    effect at the target layer departs from its linear part by three tenths. A file's vectors then keep their norms."""
    base: str = "melbo"
    """The base vector: `melbo`, `contrast` (mean difference of concept and neutral prompts), or a file of vectors
    (.safetensors, .npy, .pt)."""
    base_index: NonNegativeInt | None = None
    """Which candidate, or which row of the file, is the base; without it what they write decides."""
    candidates: PositiveInt = 20
    """MELBO candidates that ascend at once, each orthogonal to the earlier ones; where none of them writes the concept
    firmly, as many new ones follow, twice."""
    melbo_steps: PositiveInt = 60
    """Steps of ascent for each MELBO candidate, at most; every ten they are judged by what they write."""
    melbo_p: Positive = 2.0
    """MELBO's p: power of the norm that is taken over token positions."""
    melbo_q: Positive = 2.0
    """MELBO's q: root of the sum that is taken over d_model."""
    melbo_from: NonNegativeInt = 1
    """First token position that MELBO's norm runs over; 0 takes in the first, which often is an attention sink."""


class ChainOptions(SeedOptions):
    """How a chain is found (`chain`)."""

    z_from: NonNegativeInt = 1
    """First token position that z, the mean that the chain matches, takes in; 0 is the post's. The first position often
    is an attention sink: its massive activation is then most of the loss."""
    num_vectors: PositiveInt = 24
    """Vectors the chain shall find, at most d_model - 1."""
    block: PositiveInt = 1
    """Mutually orthogonal vectors sought at once: in less time, and fitted less closely (docs/benchmarks.md)."""
    solver: Literal["lbfgs", "adam"] = "lbfgs"
    """`lbfgs` inside the complement, or the post's `adam` (projected after each step)."""
    max_evaluations: PositiveInt = 30
    """Value-and-gradient evaluations for one vector, at most (`adam`: exactly; the post's 1000)."""
    tolerance: NonNegativeFloat = 1e-3
    """A vector is done when its loss fell by less than this fraction in ten evaluations; 0 never stops early."""
    norm_penalty: NonNegativeFloat = 0.0
    """λ of the term λ·‖θ‖ added to the loss."""
    max_norm: Positive | None = None
    """Largest ‖θ‖ allowed (residual-stream units); unlimited without it."""
    min_norm: NonNegativeFloat = 0.1
    """The chain ends when a vector's norm is below this (residual-stream units)."""
    max_relative_loss: Positive = 1.0
    """The chain ends when a vector's loss relative to the unsteered one reaches this: no effect is left."""


class EvaluationOptions(AnswerOptions):
    """What is asked of the vectors."""

    evals: Names = ["all"]
    """Evaluations to run, comma-separated: `all`, or some by name."""
    sample: PositiveInt | None = None
    """Vectors that evaluations beyond `kl`, `greedy` and those of the whole chain are asked of: an even sample of the
    chain; all of it without this."""
    eval_batch: PositiveInt = 8
    """Vectors in one evaluation batch."""
    samples: PositiveInt = 1
    """Continuations drawn for each vector, prompt and scale, beside the greedy one."""
    held_out_generations: NonNegativeInt = 3
    """Held-out prompts that texts are written on, beside the training prompt."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling distribution: the smallest set of tokens with this probability."""


class ClusterOptions(_Options):
    """What the actors take of a cluster."""

    min_evaluators: PositiveInt = 1
    """Evaluation actors kept at least."""
    max_evaluators: PositiveInt | None = None
    """Evaluation actors at most; without it as many as the cluster has room for."""
    eval_gpus: NonNegativeFloat | None = None
    """GPUs an evaluation actor takes: 0.25 for four on one; above 1 the model's layers are spread over them; 0 is the
    CPU. Without it half of a cluster's one GPU, or a GPU of several."""
    chain_gpus: NonNegativeFloat | None = None
    """GPUs the chain actor takes, at most 1; 0 is the CPU. Without it as an evaluation actor."""


class Config(ClusterOptions, EvaluationOptions, ChainOptions, BaseOptions, ModelOptions, StudyOptions):
    """One study: which model, which concepts, how the chain is run, what is measured, where it is stored.

    It is every group of options at once, flat: wherever a group is taken, a `Config` will do.
    """

    plan: bool = False
    """Only say what memory, GPUs, time and bytes the study will take; start nothing."""

    storage: str = "runs"
    """Where runs are kept: a directory, or any fsspec URL such as s3://bucket/prefix."""
    run_id: str | None = None
    """Name of the run; an existing one is resumed. Made from concept, model and time without it."""
