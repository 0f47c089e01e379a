"""What the vectors are as directions of the stream: verdicts on efficiency, natural use, and a hidden direction."""

import pytest

from melbo_ray.report.finding import AGAINST, LEFT_OUT, SUPPORTS, UNDECIDED
from melbo_ray.report.why import findings
from melbo_ray.runs import queries
from melbo_ray.runs.schema import SCHEMAS
from tests.studies import write_part, write_study


def judged(run, hypothesis):
    (finding,) = [f for f in findings(queries.connect(str(run)), "code") if hypothesis in f.hypothesis]
    return finding


@pytest.fixture
def run(tmp_path):
    """A run with a chain of 12, its `geometry` and `kl`, and nothing else."""
    return write_study(tmp_path, num_vectors=12, without={*SCHEMAS} - {"vectors", "geometry", "kl"})


def efficient(at_radius, rise, null=1.0, kinds=("chain", "random", "base")):
    """Vectors with a loss at R, and its rise from 0.2 under noise; the base's rises by 0.3."""
    of = {"chain": (at_radius, rise, 0.2), "random": (null, 0.0, 0.1), "base": (0.0, 0.3, 0.4)}
    return [
        {
            "kind": kind, "index": n, "loss_at_1r": loss, "loss_at_2r": 0.3, "loss_at_4r": 1.5, "loss_own": 0.2,
            "loss_noise_05": 0.2 + more, "loss_noise_10": 1.0, "kl_neutral": kl, "natural_share": 0.02,
        }
        for kind, (loss, more, kl) in of.items() if kind in kinds
        for n in (range(1, 10) if kind != "base" else [0])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("at_radius", "rise", "null", "verdict"),
    [
        (0.4, 0.35, 1.0, SUPPORTS),
        (0.6, 0.35, 1.0, AGAINST),  # at R it has less than half of the base's effect
        (0.4, 0.45, 1.0, AGAINST),  # noise raises the loss by more than 0.1 above the base's
        (0.4, 0.35, 0.3, UNDECIDED),  # random directions do as well
    ],
)
def test_vectors_are_as_efficient_and_stable_as_the_base_by_their_loss_at_r_and_its_rise(
    run, at_radius, rise, null, verdict
):
    write_part(run, "efficiency", "code", efficient(at_radius, rise, null))
    finding = judged(run, "as efficient and as stable")
    assert finding.verdict == verdict
    at = f"{at_radius:.2f} [{at_radius:.2f}, {at_radius:.2f}]"
    beside = f"(random directions {null:.2f} [{null:.2f}, {null:.2f}], the base 0.00)"
    assert f"relative loss is {at} {beside}" in finding.measured
    assert f"raises it by {rise:.2f} [{rise:.2f}, {rise:.2f}]" in finding.measured
    assert "by a KL of 0.20 [0.20, 0.20] (random directions 0.10 [0.10, 0.10], the base 0.40) nats" in finding.measured


@pytest.mark.parametrize("missing", ["random", "base"])
def test_efficiency_is_judged_beside_the_null_and_the_base_alone(run, missing):
    kinds = [kind for kind in ("chain", "random", "base") if kind != missing]
    write_part(run, "efficiency", "code", efficient(0.4, 0.3, kinds=kinds))
    assert judged(run, "as efficient and as stable").verdict == LEFT_OUT


def told_apart(hits, total):
    """A chain of which `hits` vectors lie beyond every random direction, the others among them."""
    rows = [("random", n, 0.5 + n / 1000) for n in range(1, 100)]
    rows += [("chain", n, 0.9 if n <= hits else 0.51) for n in range(1, total + 1)]
    return [
        {"kind": kind, "index": n, "texts": "concept", "sinks": "dropped", "auroc": auroc} for kind, n, auroc in rows
    ]


@pytest.mark.parametrize(
    ("hits", "total", "verdict"),
    [
        (1, 40, SUPPORTS),  # at most 13 %
        (0, 12, UNDECIDED),  # none, but up to 24 %
        (2, 20, UNDECIDED),
        (12, 20, AGAINST),
        (0, 7, UNDECIDED),
    ],
)
def test_vectors_are_not_used_if_few_of_enough_tell_texts_of_the_concept_apart(run, hits, total, verdict):
    write_part(run, "presence", "code", told_apart(hits, total))
    finding = judged(run, "the model does not use them")
    assert finding.verdict == verdict
    assert f"At the source layer {hits} of {total} [" in finding.measured


FIGURES = {
    "rms_cos_contrast": 0.02, "bessel_rms_cos": 0.05, "bessel_rms_component": 0.5, "contrast_norm_for_half_score": 3.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, AGAINST),
        ({"contrast_norm_for_half_score": None}, UNDECIDED),  # nothing to compare with
        ({"contrast_norm_for_half_score": 0.4}, UNDECIDED),  # a direction may have as much
        ({"rms_cos_contrast": 0.045}, UNDECIDED),  # nearly all of it lies in the chain's span
    ],
)
def test_a_hidden_direction_is_excluded_if_none_has_a_part_as_large_as_is_needed(run, changed, verdict):
    figures = {**FIGURES, **changed}
    rows = [{"kind": "chain", "index": 0, "figure": name, "value": value} for name, value in figures.items()]
    write_part(run, "summary", "code", rows)
    finding = judged(run, "each hides a part")
    assert finding.verdict == verdict
    assert "No direction has an rms part of more than 0.50" in finding.measured
    assert ("at no norm up to 2 R" in finding.measured) == (figures["contrast_norm_for_half_score"] is None)


@pytest.mark.parametrize(("needed", "verdict"), [(1.6, AGAINST), (0.4, UNDECIDED)])
def test_the_bases_own_dose_is_a_bound_too(run, needed, verdict):
    write_part(
        run, "summary", "code", [{"kind": "chain", "index": 0, "figure": f, "value": v} for f, v in FIGURES.items()]
    )
    of = {needed / 2: 1.9, needed: 0.9, 3 * needed: 0.1}  # unsteered 2 nats
    rows = [{"kind": "base", "index": 0, "scale": "alpha", "norm": at, "kl_from_base": kl} for at, kl in of.items()]
    write_part(run, "dose", "code", rows)
    finding = judged(run, "each hides a part")
    assert finding.verdict == verdict
    assert f"the base one of {needed:.2f} for half of the KL" in finding.measured
