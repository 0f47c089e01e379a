"""How many orthogonal steering vectors do the same thing? MELBO-ortho as a distributed batch job."""

from melbo_ray.concepts import Concept, load_concept
from melbo_ray.config import Config, UserError
from melbo_ray.melbo import Candidate, base_vector
from melbo_ray.model import LanguageModel
from melbo_ray.ortho import SteeringVector, chain
from melbo_ray.residual import Slice

__all__ = [
    "Candidate",
    "Concept",
    "Config",
    "LanguageModel",
    "Slice",
    "SteeringVector",
    "UserError",
    "base_vector",
    "chain",
    "load_concept",
]
