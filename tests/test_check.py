import pytest

from melbo_ray.check import check
from melbo_ray.config import Config, UserError


def test_another_prompt_is_trained_on_and_then_not_held_out(tmp_path):
    prompt = "What is the capital of France?"
    checked = check(Config(prompt=prompt, concepts=["code", "alien"], storage=str(tmp_path)))
    for concept in checked.concepts:
        assert concept.prompt == prompt
        assert prompt not in concept.held_out.values()
        assert len(concept.held_out) == 35


def test_an_empty_prompt_is_refused(tmp_path):
    with pytest.raises(UserError, match="empty"):
        check(Config(prompt=" ", storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run_id", [None, "mine"])
def test_what_the_command_lacks_to_resume_its_run_is_known(tmp_path, run_id):
    checked = check(Config(run_id=run_id, storage=str(tmp_path)))
    assert checked.naming == ("" if run_id else f" with --run-id {checked.config.run_id}")
