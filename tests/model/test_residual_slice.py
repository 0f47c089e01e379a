import copy
import gc
import warnings
import weakref

import pytest
import torch

from melbo_ray.errors import UserError
from melbo_ray.model.architecture import chosen, together
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from tests.families import D_MODEL, PROMPT, directions, every_family, plain_hidden_states, tiny

OTHER = torch.arange(70, 83)


@every_family
def test_the_slice_equals_the_whole_model_with_a_hook(family):
    model = tiny(family)
    thetas = directions(3)
    ours = Slice(model, [PROMPT], source=0, target=2).h_target(thetas)
    for row, theta in zip(ours, thetas, strict=True):
        blocks, _ = plain_hidden_states(model, PROMPT, 0, theta)
        torch.testing.assert_close(row, blocks[2][0], rtol=1e-5, atol=1e-5)


def test_layer_l_is_the_output_of_block_l_counted_from_0():
    """The post's numbering: blocks.1.hook_resid_post is hidden_states[2]; θ enters after the source block."""
    model, theta = tiny(), directions(1)
    slice = Slice(model, [PROMPT], source=1, target=2)
    _, unsteered = plain_hidden_states(model, PROMPT, 1, torch.zeros(D_MODEL))
    torch.testing.assert_close(slice.h_source[0], unsteered[2][0])
    _, steered = plain_hidden_states(model, PROMPT, 1, theta[0])
    torch.testing.assert_close(slice.h_target(theta)[0], steered[3][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_recorded_step_on_cuda_is_the_plain_one_of_the_cpu(dtype, near):
    on_cpu, network = tiny(), copy.deepcopy(tiny().network).to("cuda", dtype)
    places = (
        Slice(on_cpu, [PROMPT, OTHER], 1, 3),
        Slice(LanguageModel.wrap(network, on_cpu.tokenizer), [PROMPT, OTHER], 1, 3),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "steps are not recorded"
        for taken in ([0, 1], [1], [0, 1]):
            theta, z, rows = directions(len(taken)), directions(2 + len(taken))[2:], torch.tensor(taken)
            (loss, gradient), (other, theirs) = (
                [part.cpu() for part in place.value_and_grad(*(v.to(place.model.device) for v in (theta, z, rows)))]
                for place in places
            )
            torch.testing.assert_close(other, loss, rtol=near, atol=near)
            assert float(torch.cosine_similarity(gradient, theirs).min()) > 1 - near


def test_z_is_the_mean_over_every_position_and_steering_by_0_changes_nothing():
    model = tiny()
    slice = Slice(model, [PROMPT], source=1, target=2)
    _, states = plain_hidden_states(model, PROMPT, 1, torch.zeros(D_MODEL))
    torch.testing.assert_close(slice.z(torch.zeros(1, D_MODEL))[0], states[3][0].mean(0))


@every_family
def test_prompts_of_different_lengths_share_a_batch(family):
    model, thetas = tiny(family), directions(2)
    both = Slice(model, [PROMPT, OTHER], source=1, target=3).z(thetas)
    for i, tokens in enumerate([PROMPT, OTHER]):
        alone = Slice(model, [tokens], source=1, target=3).z(thetas[i : i + 1])[0]
        torch.testing.assert_close(both[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error:.*costs time only")
@pytest.mark.parametrize("family", ["gemma4", "gemma4-shared"])
def test_each_prompt_keeps_what_its_layers_are_called_with(family):
    """Embeddings of every layer's own, and keys and values that later layers take from earlier ones."""
    model, thetas = tiny(family), directions(3)
    both, rows = Slice(model, [PROMPT, OTHER], source=1, target=3), torch.tensor([1, 0, 1])
    found = both.z(thetas, rows)
    for row, theta, z in zip(rows, thetas, found, strict=True):
        tokens = [PROMPT, OTHER][row]
        blocks, _ = plain_hidden_states(model, tokens, 1, theta)
        torch.testing.assert_close(z, blocks[3][0].mean(0), rtol=1e-4, atol=1e-4)
    for taken in (rows, 1 - rows):
        inputs = thetas, directions(3, seed=5), taken
        for recorded, plain in zip(both.value_and_grad(*inputs), both._value_and_grad(*inputs), strict=True):
            torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-5)


def test_arguments_that_differ_and_have_no_row_for_each_prompt_are_refused():
    for pair in ([torch.zeros(2, 3), torch.ones(2, 3)], [torch.zeros(1, 3), torch.zeros(1, 4)], [1, 2]):
        with pytest.raises(UserError, match="differently for each prompt"):
            together([((), {"bias": part}) for part in pair], {})
    same = together([((1, torch.ones(2, 3)), {"scale": None})] * 2, {})
    assert chosen(same, lambda _: pytest.fail("nothing is by prompt"), {})[1] == {"scale": None}


def test_rows_say_which_prompt_a_vector_steers():
    slice, thetas = Slice(tiny(), [PROMPT, OTHER], source=1, target=3), directions(3)
    chosen = slice.z(thetas, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(chosen[0], Slice(tiny(), [OTHER], 1, 3).z(thetas[:1])[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="rows"):
        slice.z(thetas)


def test_the_gradient_is_the_finite_difference():
    slice = Slice(tiny(), [PROMPT], source=1, target=3)
    theta, along = directions(1).requires_grad_(), directions(1, norm=1.0, seed=1)
    target = slice.z(directions(1, seed=2)).detach()

    def loss(theta):
        return (slice.z(theta) - target).norm()

    (gradient,) = torch.autograd.grad(loss(theta), theta)
    step = 1e-2
    difference = (loss(theta + step * along) - loss(theta - step * along)) / (2 * step)
    assert float((gradient * along).sum().detach()) == pytest.approx(float(difference.detach()), rel=1e-2)


def test_no_hook_stays_behind():
    model = tiny()
    Slice(model, [PROMPT], source=1, target=2)
    assert not any(layer._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize(
    ("source", "target", "said"), [(2, 2, "below"), (3, 1, "below"), (0, 4, "0 to 3"), (9, 12, "0 to 3")]
)
def test_layers_that_cannot_be_are_refused(source, target, said):
    with pytest.raises(UserError, match=said):
        Slice(tiny(), [PROMPT], source, target)


def test_a_slice_goes_with_its_last_reference():
    gc.disable()
    try:
        gone = weakref.ref(Slice(tiny(), [PROMPT], 1, 2))
        assert gone() is None
    finally:
        gc.enable()


def test_where_arguments_fit_one_row_alone_vectors_pass_one_at_a_time_and_a_warning_says_so():
    # Bloom's ALiBi has a row for each head of each prompt.
    model, thetas = tiny("bloom"), directions(3)
    model.kept.clear()
    with pytest.warns(UserWarning, match="vectors pass the slice one at a time, which costs time only"):
        slice = Slice(model, [PROMPT, OTHER], source=0, target=2)
    rows = torch.tensor([1, 0, 1])
    ours = slice.h_target(thetas, rows)
    losses, gradients = slice.value_and_grad(thetas, directions(3, seed=9), rows)
    for i, tokens in enumerate((OTHER, PROMPT, OTHER)):
        blocks, _ = plain_hidden_states(model, tokens, 0, thetas[i])
        torch.testing.assert_close(ours[i, : len(tokens)], blocks[2][0], rtol=1e-4, atol=1e-4)
        alone = slice.value_and_grad(thetas[i : i + 1], directions(3, seed=9)[i : i + 1], rows[i : i + 1])
        torch.testing.assert_close(losses[i], alone[0][0])
        torch.testing.assert_close(gradients[i], alone[1][0], rtol=1e-4, atol=1e-5)
