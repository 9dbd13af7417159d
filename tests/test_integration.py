"""Students from teachers, and distillation."""

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_bank
from test_vision import TINY

from ones_lib import Distillation, gather, integrate
from ones_lib.distillation import soft_kl
from ones_lib.vision import WideNet

ALL = ["sum", "average", "topk", "svd", "shared_kd", "zero_ffn", "one_expert"]


def teacher(**kwargs):
    torch.manual_seed(0)
    return WideNet(**{**TINY, "num_experts": 4, **kwargs}).eval()


@pytest.mark.parametrize("share_depth", [True, False])
@pytest.mark.parametrize("method", ALL)
def test_everything_but_the_experts_is_copied(method, share_depth):
    moe = teacher(share_depth=share_depth)
    student, report = integrate(moe, method)
    source, target = dict(moe.named_parameters()), dict(student.named_parameters())
    table = report.table().set_index("parameter")
    assert set(table.index) == set(source)
    assert set(table.index[table["action"] == "dropped"]) == {n for n in source if "router" in n}
    replaced = set(table.index[table["action"].isin(["gathered", "replaced"])])
    assert replaced == {n for n in source if ".mlp." in n and "router" not in n}
    assert len(replaced) == (4 if share_depth else 12)
    for name in table.index[table["action"] == "copied"]:
        torch.testing.assert_close(target[name], source[name], rtol=0, atol=0)
        assert target[name].data_ptr() != source[name].data_ptr()
    assert target.keys() == source.keys() - {n for n in source if "router" in n}


@pytest.mark.parametrize("method", ["sum", "average", "topk", "svd"])
def test_every_layer_is_gathered_from_its_own_experts(method):
    moe = teacher(share_depth=False)
    student, _ = integrate(moe, method, scale=0.5)
    for layer, ffn in zip(moe.moe_layers(), student.moe_layers(), strict=True):
        expected = gather(layer.bank(), method, scale=0.5)
        for name, tensor in expected.tensors():
            torch.testing.assert_close(getattr(ffn, name)[0], tensor)


def test_student_of_equal_experts_is_the_teacher():
    """Renormalised gates and equal experts: the average's student computes the teacher's function."""
    moe = teacher(renormalize=True)
    bank = equal_bank(4, d_ff=10, d_model=12)
    with torch.no_grad():
        for name, tensor in bank.tensors():
            getattr(moe.moe_layers()[0], name).copy_(tensor)
    student, _ = integrate(moe, "average")
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(student.eval()(images), moe(images), atol=1e-5, rtol=1e-5)


def test_controls():
    moe = teacher()
    tokens = torch.randn(5, 12)
    zero = integrate(moe, "zero_ffn")[0].moe_layers()[0]
    assert torch.equal(zero(tokens), torch.zeros(5, 12))
    zero(tokens).square().sum().backward()
    fresh, other = (integrate(moe, "shared_kd", seed=s)[0].moe_layers()[0].up for s in (0, 1))
    assert not torch.equal(fresh, other)
    assert torch.equal(fresh, integrate(moe, "shared_kd", seed=0)[0].moe_layers()[0].up)
    bank = moe.moe_layers()[0].bank()
    drawn = {
        next(
            i
            for i in range(4)
            if torch.equal(bank.up[i], integrate(moe, "one_expert", seed=s)[0].moe_layers()[0].up[0])
        )
        for s in range(12)
    }
    assert len(drawn) > 1


def test_a_zero_ffn_can_learn():
    student = integrate(teacher(), "zero_ffn")[0]
    student(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert student.moe_layers()[0].down.grad.abs().sum() > 0


def test_integration_leaves_teacher_and_random_state_alone():
    moe = teacher()
    before, state = {n: p.clone() for n, p in moe.named_parameters()}, torch.get_rng_state()
    for method in ALL:
        integrate(moe, method)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in moe.named_parameters():
        assert torch.equal(parameter, before[name])


def test_topk_with_k_makes_a_wider_student():
    student, _ = integrate(teacher(), "topk", k=5)
    assert student.moe_layers()[0].up.shape == (1, 20, 12)
    assert student(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_report_says_what_happened():
    text = str(integrate(teacher(), "svd")[1])
    assert "svd: " in text
    assert "4 tensors (1,048 weights) gathered" in text  # 4 * (10*12 + 12*10 + 10 + 12)
    assert "1 tensors (48 weights) dropped" in text


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: integrate(teacher(), "best"), "method: expected one of .*zero_ffn.*found 'best'"),
        (lambda: integrate(teacher(num_experts=1, top_k=1), "svd"), "teacher: expected at least one MoE layer"),
        (lambda: integrate(teacher(), "zero_ffn", rank=2), "rank: control 'zero_ffn' takes no options"),
        (lambda: Distillation(temperature=0), "temperature: expected a positive number, found 0"),
        (lambda: Distillation(alpha=1.5), "alpha: expected a number from 0 to 1, found 1.5"),
    ],
)
def test_bad_input(action, message):
    with pytest.raises((ValueError, TypeError), match=message):
        action()


def test_soft_kl_by_the_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher_logits = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    p, q = (teacher_logits / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(soft_kl(student, teacher_logits, 3.0).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        soft_kl(student.view(2, 3, 5), teacher_logits.view(2, 3, 5), 3.0), soft_kl(student, teacher_logits, 3.0)
    )


def test_distillation_weighs_both_losses():
    student, other, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    task = F.cross_entropy(student, labels)
    torch.testing.assert_close(Distillation(2.0, 0.0).loss(task, student, other), task)
    torch.testing.assert_close(Distillation(2.0, 1.0).loss(task, student, other), soft_kl(student, other, 2.0))
    mixed = Distillation(2.0, 0.25).loss(task, student, other)
    torch.testing.assert_close(mixed, 0.75 * task + 0.25 * soft_kl(student, other, 2.0))


def test_gradient_is_zero_where_the_student_equals_the_teacher():
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    student, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    Distillation(2.0, 1.0).loss(F.cross_entropy(student, labels), student, other).backward()
    torch.testing.assert_close(student.grad, torch.zeros(6, 5), atol=1e-6, rtol=0)
    assert other.grad is None


def test_gradients_at_high_temperature_match_those_of_logit_matching():
    """Hinton et al., section 2.1: for T far above the logits, T^2 KL has the gradient of (1/2N) |z - v|^2, N classes."""
    student, other = torch.randn(4, 5), torch.randn(4, 5)
    student, other = ((z - z.mean(-1, keepdim=True)).double() for z in (student, other))
    student.requires_grad_()
    soft_kl(student, other, 200.0).backward()
    torch.testing.assert_close(student.grad, (student.detach() - other) / 5 / 4, atol=2e-3, rtol=0.05)
