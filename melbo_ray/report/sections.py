"""The sections of the report, one figure each per concept, in the order of the page."""

from collections.abc import Callable
from dataclasses import dataclass

import duckdb
import plotly.graph_objects as go

from melbo_ray.report import plots, why_median_plots, why_plots


@dataclass(frozen=True)
class Section:
    """A figure of a concept with its caption.

    Attributes:
        name: name of the figure, in the page as `<concept>-<name>` and in files as `<concept>-<name>.png`.
        title: heading of the section.
        table: table of the data; if it has no rows, the page says how to measure them.
        evaluation: the evaluation that writes the table, as in the option `evals`.
        draw: draws the figure of a concept from the run's views; returns None if there are no data.
        caption: HTML that explains the axes, the value 0, lines and bands.
        along_n: whether the x axis is n, which links the figure with the explorer by clicks and a cursor line.
    """

    name: str
    title: str
    table: str
    evaluation: str
    draw: Callable[[duckdb.DuckDBPyConnection, str], go.Figure | None]
    caption: str
    along_n: bool = False


SECTIONS = (
    Section(
        "kl", "KL against n", "kl", "kl", plots.draw_kl,
        """KL(P_n ‖ P_base) at the last token of the training prompt, in nats: how far the model under the n-th vector
        is from the model under the base (the expectation runs over P_n; column <code>kl_from_base</code>). 0 is the
        base itself, the dashed line no steering at all, the grey band what random directions of the same norms give,
        crosses (if any) vectors solved like the chain's for what random directions do. Dots are vectors, the line their
        moving average over 50.""",
        along_n=True,
    ),
    Section(
        "norm", "Magnitude against n", "vectors", "kl", plots.draw_norm,
        """The norm that each vector took to come as close to the base's effect as it did. Late in a chain norm and
        likeness fall together; the dose-response tells the two apart.""",
        along_n=True,
    ),
    Section(
        "dose", "Dose-response", "dose", "dose", plots.draw_dose,
        """KL(P ‖ P_base) in nats of each direction scaled to other norms; at most 24 vectors, coloured by n. The grey
        band is the null: a curve inside it does no better than a random direction of the same norm.""",
    ),
    Section(
        "composition", "Composition", "composition", "composition", plots.draw_composition,
        """KL(P ‖ P_base) in nats of the mean of k vectors: the first k, and random subsets (their median). The mean of
        k orthogonal vectors is √k times shorter than they are (own): compare it at their median norm (typical).
        Ablated: the base steers, and the mean's direction is taken out of the stream; the base needs it as far as KL
        rises. Grey: means of random directions of the same number and norms, and the base without them.""",
    ),
    Section(
        "presence", "Presence in the model's own activations", "presence", "presence", plots.draw_presence,
        """How well the projection of unsteered activations on a direction tells texts of the concept from neutral ones,
        attention sinks left out (with them: click the legend): 0.5 is chance, on either side. Random directions miss
        it, too, since the sets differ in much: if the model uses a vector's direction itself, the vector lies outside
        of the grey band, which 5 % of random directions do.""",
    ),
    Section(
        "generalization", "Generalisation to prompts held out", "generalization", "generalization",
        plots.draw_generalization,
        """KL(P_n ‖ P_base) at the last token of prompts that the chain never saw, as a share of what no steering gives
        on that prompt: 0 is like the base, 1 like no steering, colours end at 1.5. Sorted: the hardest prompt is at the
        top.""",
        along_n=True,
    ),
    Section(
        "linear", "Why: what a linear map allows", "linear", "linear", why_plots.draw_linear,
        """Loss relative to no steering: what the chain found, and the chain that a model linear in θ (Jacobian at 0)
        would find at the same norms (dashed). 0 is the base's effect, 1 none. If the dots lie on the dashed line, the
        spectrum of the map explains how many vectors there are; where they stay below it, curvature does. The solid
        line is the best that the linear model has left beside the vectors found, which is much if they do not use it;
        grey, beside random directions.""",
        along_n=True,
    ),
    Section(
        "gain", "Why: the gain along a vector", "gain", "gain", why_plots.draw_gain,
        """How much of the base's displacement is gained per unit on the way from 0 to a vector (the derivative there,
        along the base's displacement; median). The area under a line is what the vector has in the end. A linear
        effect is level, a quadratic one rises from 0 in equal steps. The grey band: random directions of the same
        norms.""",
    ),
    Section(
        "curvature", "Why: what a quadratic form allows", "curvature", "curvature", why_plots.draw_curvature,
        """The part of the base's displacement that the n-th vector has: found, and to second order (gradient and
        Hessian at 0). 1 is the base's, 0 none. Beside it the eigenvectors of the Hessian, the n-th at the norm of the
        n-th vector: by the form, and in the model. Where the two lines of eigenvectors are as high as the dots,
        curvature explains the count. Dashed: random directions of the same norms.""",
        along_n=True,
    ),
    Section(
        "convergence", "Why: convergence along the layers", "convergence", "convergence", why_plots.draw_convergence,
        """What the vectors change in the stream, from the source layer to the last: the median cosine of a vector's
        displacement with the base's (0 orthogonal, 1 the same direction), over the band of random directions of the
        same norms. Dashed: the participation ratio of all displacements as a share of their number: 1 if they are
        orthogonal, near 0 if they are one direction. Dash-dotted: centred kernel alignment with the source, where 1
        says that the vectors differ from their mean as they did there.""",
    ),
    Section(
        "positions", "Why: convergence at each token", "token_cosines", "convergence", why_plots.draw_token_cosines,
        """The same cosine at every token of the prompt, the last at the bottom (medians): found, and random directions
        of the same norms. At an attention sink, often at the first position, random directions agree with the base,
        too.""",
    ),
    Section(
        "mediation", "Why: the effect without a common direction", "mediation", "mediation",
        why_median_plots.draw_mediation,
        """The chain's vectors steer, and at one layer their displacement loses the leading directions of the base's, or
        the direction of the base's at the last token: the share of their effect on KL that is lost (1: all; medians,
        95 % intervals). Beside it the nulls: the same of the displacements of random directions of the same norms.""",
    ),
    Section(
        "frozen", "Why: the effect without moved attention", "frozen", "frozen", why_plots.draw_frozen,
        """What is left of a vector's displacement along the base's with every attention pattern as it is unsteered: 1
        if attention has no part in it, 0 if it acts by moving attention alone. Open: random directions of the same
        norms. Vectors whose displacement has a cosine of 0.1 or less with the base's are not shown.""",
        along_n=True,
    ),
    Section(
        "independence", "Why: independence", "independence", "independence", why_median_plots.draw_independence,
        """A profile is a direction's cosines with the unsteered stream along the layers: how much it changes (rms) when
        another direction is ablated at every layer (medians, 95 % intervals over vectors). Independent vectors change
        each other's as little as a random direction in their place does. Where the cosines themselves are no larger
        than a random unit vector's (dashed), there is nothing to ablate.""",
    ),
    Section(
        "privileged", "Why: exponents of mixtures", "privileged", "privileged", why_median_plots.draw_privileged,
        """A direction is mixed with a partner, with both signs; the exponent is that of the contour of equal effect: 2
        (line) if it is linear or a quadratic form, above 2 if mixtures do less than either alone, as error correction
        of features would have it, or if both effects set in late (medians, 95 % intervals). Random directions are the
        null, the base, the mean difference and principal components what the model is known to use.""",
    ),
    Section(
        "efficiency", "Why: efficiency and stability", "efficiency", "efficiency", why_median_plots.draw_efficiency,
        """Loss relative to no steering (0: the base's effect, 1: none) at equal norms, at the vector's own, and there
        with an orthogonal random vector added; at the right how far the vector changes the predictions on neutral
        texts. A solution that a model prefers has a low loss at a small norm and keeps it under noise (medians, 95 %
        intervals). The base has 0 at R by definition.""",
    ),
)  # fmt: skip


def figures(db: duckdb.DuckDBPyConnection, concept: str) -> dict[str, go.Figure]:
    """The figures of a concept by section name, without those that have no data."""
    drawn = {section.name: section.draw(db, concept) for section in SECTIONS}
    return {name: figure for name, figure in drawn.items() if figure is not None}
