import numpy as np
import pytest
import torch

from melbo_ray.evals.context import Chain
from melbo_ray.evals.control import random_directions
from melbo_ray.evals.runner import evaluate
from melbo_ray.model.sampling import Request, generate
from melbo_ray.seeds import derive_seed
from tests.evals import reference
from tests.evals.reference import rows_of


def test_means_of_subsets_are_those_of_plain_forward_passes(study, chain):
    table = evaluate("composition", study, chain)["composition"]
    drawn = random_directions(study, Chain(study.base, chain), chain.index)
    for row in rows_of(table, scale="own") + rows_of(table, scale="typical"):
        theta = drawn.theta if row["kind"] == "random" else chain.theta
        mean = theta[[index - 1 for index in row["members"]]].mean(0)
        if row["scale"] == "typical":
            mean = mean / mean.norm() * float(np.median(chain.norms))
        expected = reference.divergences(study, mean) | {
            "norm": float(mean.norm()), "concept_score": reference.concept_score(study, mean),
        }  # fmt: skip
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=2e-4)
        assert (row["text"] is None) == (row["kind"] == "random")


def test_every_mean_has_one_of_random_directions_of_the_same_number_and_norms_beside_it(study, chain):
    table = evaluate("composition", study, chain)["composition"]
    ours, null = ({row["index"]: row for row in rows_of(table, kind=kind)} for kind in ("chain", "random"))
    assert ours.keys() == null.keys()
    for index, row in ours.items():
        same = ("k", "members", "rule", "scale")
        assert [row[name] for name in same] == [null[index][name] for name in same]
        if row["scale"] != "own":
            assert null[index]["norm"] == pytest.approx(row["norm"], rel=1e-5)
        assert null[index]["kl_from_base"] != pytest.approx(row["kl_from_base"], rel=1e-3)


def test_subsets_are_the_first_k_and_random_ones_of_the_same_sizes(study, chain):
    rows = rows_of(evaluate("composition", study, chain)["composition"], kind="chain", scale="own")
    assert [(row["rule"], row["k"]) for row in rows] == [
        ("first", 2), ("random", 2), ("random", 2), ("first", 3), ("random", 3), ("random", 3), ("first", 5),
    ]  # fmt: skip
    assert [row["members"] for row in rows if row["rule"] == "first"] == [[1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert all(len(set(row["members"])) == row["k"] for row in rows)
    assert evaluate("composition", study, chain.take([0]))["composition"].num_rows == 0


def test_ablating_projects_the_mean_out_of_the_stream_under_the_base(study, chain):
    drawn = random_directions(study, Chain(study.base, chain), chain.index)
    for row in rows_of(evaluate("composition", study, chain)["composition"], scale="ablated"):
        theta = drawn.theta if row["kind"] == "random" else chain.theta
        mean = theta[[index - 1 for index in row["members"]]].mean(0)
        unit = mean / mean.norm()

        def ablate(_layer, _args, output, unit=unit):
            steered = output + study.base
            return steered - (steered @ unit)[..., None] * unit

        handle = study.model.layers[1].register_forward_hook(ablate)
        with torch.no_grad():
            logits = study.model.network(reference.prompt_tokens(study)[None]).logits[0, -1]
        handle.remove()
        log_p = logits.double().log_softmax(-1).numpy()
        assert row["kl_from_base"] == pytest.approx(
            reference.kl(log_p, reference.next_token(study, study.base)), abs=1e-4
        )
        assert row["norm"] == pytest.approx(5)
        if row["kind"] == "random":
            assert row["text"] is None
            continue
        seed = derive_seed(study.config.seed, "code", row["index"], "generations/composition/training/ablated")
        request = Request(reference.prompt_tokens(study), study.base, seed, unit)
        (text,) = generate(study.model, [request], 1, max_new_tokens=8)
        assert row["text"] == study.model.tokenizer.decode(text.tokens, skip_special_tokens=True)
