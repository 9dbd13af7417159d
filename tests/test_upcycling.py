"""Sparse upcycling: the dense model's function before training, and what is gathered from it."""

import pytest
import timm
import torch
from test_integration import calibration
from test_vision import TINY

from ones_lib import integrate, upcycle
from ones_lib.distillation import HiddenStates
from ones_lib.models.images import WideNet
from ones_lib.models.text import WideNetForMaskedLM, WideNetTextConfig
from ones_lib.moe import MoEFeedForward


def dense(**kwargs):
    torch.manual_seed(0)
    model = WideNet(**{**TINY, "num_experts": 1, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and head are zero at first
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def timms(name="vit_tiny_patch16_224", **kwargs):
    """timm's own vision transformer, with a class token."""
    torch.manual_seed(0)
    return timm.create_model(name, img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5, **kwargs).eval()


def language_model():
    torch.manual_seed(0)
    config = {"vocab_size": 30, "embedding_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "num_experts": 1}
    return WideNetForMaskedLM(WideNetTextConfig(**config, num_attention_heads=2, intermediate_size=10)).eval()


DENSE = {
    "shared": (dense, torch.randn(3, 3, 16, 16)),
    "not shared": (lambda: dense(share_depth=False), torch.randn(3, 3, 16, 16)),
    "timm": (timms, torch.randn(3, 3, 32, 32)),
    "timm, layer scale, mean pooling": (
        lambda: timms(init_values=0.1, global_pool="avg", class_token=False),
        torch.randn(3, 3, 32, 32),
    ),
    "text": (language_model, torch.randint(30, (3, 7))),
}


def output(model, x):
    result = model(x)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("case", DENSE)
def test_before_training_it_computes_the_dense_models_function(case):
    make, x = DENSE[case]
    model, state = make(), torch.get_rng_state()
    moe = upcycle(model, 4, top_k=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(output(moe.eval(), x), output(model, x), atol=1e-5, rtol=1e-5)
    assert len(moe.moe_layers()) == (1 if case in ("shared", "text") else 3 if case == "not shared" else 2)
    for layer in moe.moe_layers():
        assert layer.router.weight.shape[0] == 4
        assert not torch.equal(layer.router.weight[0], layer.router.weight[1])
        for _, copies in layer.bank().tensors():
            assert torch.equal(copies, copies[:1].expand_as(copies))
    if case.startswith("timm"):
        assert not any(isinstance(m, MoEFeedForward) for m in model.modules())  # what was given is left alone


@pytest.mark.parametrize("case", DENSE)
def test_averaging_gives_the_dense_model_back_and_training_goes_on(case):
    make, x = DENSE[case]
    model = make()
    moe = upcycle(model, 4).eval()
    student, report = integrate(moe, "average")
    torch.testing.assert_close(output(student.eval(), x), output(model, x), atol=1e-5, rtol=1e-5)
    assert report.table()["action"].value_counts()["dropped"] == len(moe.moe_layers())
    states = HiddenStates(moe)
    loss = output(moe.train(), x).square().sum()
    assert len(states.last) == (3 if "hared" in case else 2)
    assert moe.balance_loss() > 0
    (loss + moe.balance_loss()).backward()
    # By the balance loss: equal experts whose gates sum to 1 give the same output whatever the router says.
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in moe.moe_layers())


def test_without_renormalised_gates_it_computes_something_else():
    model, x = dense(), torch.randn(3, 3, 16, 16)
    assert not torch.allclose(upcycle(model, 4, renormalize=False).eval()(x), model(x), atol=1e-3)


def test_noise_is_relative_to_each_matrix():
    model = dense()
    layer = upcycle(model, 50, noise=0.1).moe_layers()[0]
    for name, tensor in model.moe_layers()[0].bank().expert(0).tensors():
        spread = (getattr(layer, name) - tensor).std() / tensor.square().mean().sqrt()
        assert spread.item() == pytest.approx(0.1, rel=0.1), name
    one, two, other = (upcycle(model, 4, noise=0.1, seed=s).moe_layers()[0].up for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_student_of_noisy_copies_by_every_way():
    """Close copies have an ancestor: averaging is near it; and all methods work on timm's models too."""
    model = timms()
    moe = upcycle(model, 4, noise=0.05).eval()
    data = calibration(batches=1)
    data.batches[0] = torch.randn(8, 3, 32, 32)
    x = torch.randn(3, 3, 32, 32)
    for method in ("average", "joint_fit"):
        options = {"steps": 30, "calibration": data} if method == "joint_fit" else {}
        student, _ = integrate(moe, method, **options)
        assert (student.eval()(x) - moe(x)).norm() < 0.1 * moe(x).norm()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: upcycle(dense(), 1), "num_experts: expected an integer of at least 2, found 1"),
        (lambda: upcycle(dense(), 4, noise=-1), "noise: expected a number of at least 0, found -1"),
        (lambda: upcycle(WideNet(**TINY), 4), "dense: expected a dense model, found one with 4 experts"),
        (lambda: upcycle(torch.nn.Linear(3, 3), 4), "dense: expected feed-forward networks .* found none in Linear"),
        (lambda: upcycle(dense(), 4, top_k=5), "top_k: expected an integer from 1 to num_experts=4, found 5"),
    ],
)
def test_bad_input(action, message):
    with pytest.raises(ValueError, match=message):
        action()
