import dataclasses

import torch

from melbo_ray.concepts.detectors import score_text
from melbo_ray.evals.context import Vectors
from melbo_ray.evals.runner import evaluate
from melbo_ray.seeds import derive_seed
from tests.evals import reference


def written_by_hand(study, prompt, theta, seed, greedy):
    written = reference.written(study, reference.prompt_tokens(study, prompt), theta, seed, 8, greedy)
    return study.model.tokenizer.decode(written, skip_special_tokens=True), len(written)


def texts(study, vectors):
    """The rows of both evaluations that write texts; none is another's."""
    parts = [evaluate(name, study, vectors)["generations"].to_pylist() for name in ("greedy", "generations")]
    keys = [(row["index"], row["prompt_id"], row["scale"], row["sample"]) for part in parts for row in part]
    assert len(keys) == len(set(keys))
    return [row for part in parts for row in part]


def test_every_vector_has_a_greedy_text_on_the_training_prompt_at_its_own_norm(study, chain):
    rows = evaluate("greedy", study, chain)["generations"].to_pylist()
    keys = [(row["index"], row["prompt_id"], row["scale"], row["sample"], row["temperature"]) for row in rows]
    assert keys == [(index, "training", "own", 0, 0) for index in chain.index]


def test_texts_are_those_of_plain_forward_passes_greedy_first(study, chain):
    prompts = {"training": study.concept.prompt, "river": study.concept.held_out["river"]}
    for row in texts(study, chain):
        theta = chain.theta[row["index"] - 1]
        theta = theta / theta.norm() * 5 if row["scale"] == "radius" else theta
        purpose = f"generations/chain/{row['prompt_id']}/{row['scale']}/{row['sample']}"
        seed = derive_seed(study.config.seed, "code", row["index"], purpose)
        greedy = row["sample"] == 0
        text, count = written_by_hand(study, prompts[row["prompt_id"]], theta, seed, greedy)
        assert row["temperature"] == (0 if greedy else 1)
        assert (row["text"], row["num_tokens"]) == (text, count)
        assert row["finish_reason"] == ("length" if count == 8 else "stop")
        assert {name: row[name] for name in ("detected", "language")} == {
            name: value for name, value in score_text(study.concept, text).items() if name != "concept_score"
        }


def test_every_vector_writes_greedily_and_by_sampling_on_the_training_and_the_held_out_prompts(study, chain):
    keys = [(row["index"], row["prompt_id"], row["scale"], row["sample"]) for row in texts(study, chain)]
    places = [("training", "own"), ("training", "radius"), ("river", "own")]
    assert sorted(keys) == sorted((i, *place, sample) for i in chain.index for place in places for sample in (0, 1, 2))


def test_unsteered_texts_have_one_scale(study):
    rows = texts(study, Vectors("unsteered", [0], torch.zeros_like(study.base)[None]))
    assert [row["scale"] for row in rows] == ["own"] * 6


def test_at_temperature_0_there_is_one_text_and_it_is_greedy(study, chain):
    cold = dataclasses.replace(study, config=study.config.model_copy(update={"temperature": 0.0}))
    assert texts(cold, chain) == [row for row in texts(study, chain) if row["sample"] == 0]
    bare = dataclasses.replace(cold, config=cold.config.model_copy(update={"held_out_generations": 0}))
    unsteered = Vectors("unsteered", [0], torch.zeros_like(study.base)[None])
    assert [row["sample"] for row in texts(bare, unsteered)] == [0]
