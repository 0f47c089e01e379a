"""What is computed of a model is what transformers computes of it, on a spread of families."""

import pytest

from tests.architectures import CHECKS, families, judge

SPREAD = [
    "bloom", "falcon", "gpt_neo", "gptj", "mpt", "opt", "cohere2", "gemma4_text", "gpt_oss", "mixtral", "deepseek_v3",
    "minicpm3", "minimax", "lfm2", "qwen3_next", "jamba", "mamba2", "recurrent_gemma", "zamba2", "gemma3n_text",
]  # fmt: skip


@pytest.mark.parametrize("family", SPREAD)
def test_nothing_is_wrong(family):
    cells = judge(family)
    assert list(cells) == list(CHECKS)
    assert {cell["verdict"] for cell in cells.values()} <= {"exact", "plain way", "refused"}, cells
    assert all("\n" not in cell.get("why", "") for cell in cells.values())


def test_the_spread_is_of_families_that_there_are():
    assert set(SPREAD) <= set(families())
    assert len(SPREAD) == 20 == len(set(SPREAD))
