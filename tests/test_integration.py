"""Students from teachers, and distillation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_bank
from test_vision import TINY

from ones_lib import Calibration, Distillation, gather, gathering_methods, integrate
from ones_lib.distillation import HiddenStates, adapt_routers, hidden_error, routers, sampled_experts, soft_kl
from ones_lib.gathering import registry
from ones_lib.gathering.regression import fit
from ones_lib.integration import calibrated, integration_methods, widening_methods
from ones_lib.joint_fit import fit_jointly
from ones_lib.models.images import WideNet

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


# --- on data ----------------------------------------------------------------------------------------------------------


def calibration(batches=4, max_tokens=10_000):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(batches)]
    return Calibration(lambda model, batch: model(batch), images, max_tokens)


@pytest.fixture
def short_fit(monkeypatch):
    """A layer-wise fit of 50 steps instead of 1000."""
    monkeypatch.setitem(registry._METHODS, "fit", partial(fit, steps=50))


def test_every_method_makes_a_student_of_every_teacher(short_fit):
    teachers = [teacher(), teacher(share_depth=False), teacher(slots_per_expert=2)]
    for moe in teachers:
        for method in integration_methods():
            data = calibration(batches=1) if calibrated(method) else None
            options = {"steps": 2} if method == "joint_fit" else {}
            student, report = integrate(moe, method, calibration=data, **options)
            assert student.eval()(torch.randn(2, 3, 16, 16)).isfinite().all()
            assert len(report.table().query("action == 'copied'")) > 10


def test_students_of_active_width(short_fit):
    """An FFN of zeros is the same function at any width."""
    moe, data = teacher(), calibration(batches=1)
    h = moe.moe_layers()[0].up.shape[1]
    for method in ("average", "topk", "fit", "joint_fit", "shared_kd", "zero_ffn"):
        assert method in widening_methods()
        options = {"steps": 2} if method == "joint_fit" else {}
        wide, _ = integrate(moe, method, calibration=data, d_ff=2 * h, **options)
        assert {layer.up.shape[1] for layer in wide.moe_layers()} == {2 * h}
        assert wide.eval()(torch.randn(2, 3, 16, 16)).isfinite().all()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(wide(x), integrate(moe, "zero_ffn")[0].eval()(x))
    assert not {"one_expert", "matched_average"} & set(widening_methods())


def test_layers_are_gathered_on_their_own_activations():
    moe = teacher(share_depth=False)
    found = calibration().activations(moe)
    assert list(found) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    student, _ = integrate(moe, "readout", calibration=calibration())
    for name, layer in zip(found, moe.moe_layers(), strict=True):
        expected = gather(layer.bank(), "readout", calibration=found[name])
        for part, tensor in expected.tensors():
            torch.testing.assert_close(getattr(student.get_submodule(name), part)[0], tensor)


def test_scale_by_a_router_whose_gates_are_open_needs_data():
    """Where gates are renormalised they sum to 1; else what they sum to is measured."""
    assert integrate(teacher(renormalize=True), "sum", scale="router")
    with pytest.raises(ValueError, match="calibration: expected data, which 'sum' needs here, found None"):
        integrate(teacher(), "sum", scale="router")
    moe = teacher()
    student, _ = integrate(moe, "average", scale="router", calibration=calibration())
    gate_sum = calibration().activations(moe)["blocks.0.mlp"].gate_sum()
    assert 0.5 < gate_sum < 1
    torch.testing.assert_close(student.moe_layers()[0].down, gate_sum * moe.moe_layers()[0].down.mean(0, keepdim=True))


def stream_error(student, moe):
    watched, target = HiddenStates(student.eval()), HiddenStates(moe)
    images = torch.cat(calibration().batches)
    with torch.no_grad():
        student(images), moe(images)
        watched.close(), target.close()
        return hidden_error(watched.last, target.last).item()


@pytest.mark.parametrize("share_depth", [True, False])
def test_the_joint_fit_is_nearer_to_the_teachers_stream_and_moves_nothing_else(share_depth, short_fit):
    moe = teacher(share_depth=share_depth)
    layerwise, _ = integrate(moe, "fit", calibration=calibration())
    joint, _ = integrate(moe, "joint_fit", calibration=calibration(), steps=100)
    assert stream_error(joint, moe) < stream_error(layerwise, moe)
    before = dict(layerwise.named_parameters())
    for name, parameter in joint.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name]) == (".mlp." not in name), name
    again, _ = integrate(moe, "joint_fit", calibration=calibration(), steps=100)
    assert all(torch.equal(p, q) for p, q in zip(joint.parameters(), again.parameters(), strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for model in (moe, joint) for m in model.modules())


def test_a_joint_fit_that_gets_worse_is_undone(short_fit):
    moe = teacher()
    layerwise, _ = integrate(moe, "fit", calibration=calibration())
    student, _ = integrate(moe, "fit", calibration=calibration())
    fit_jointly(student, moe, calibration(), steps=2, learning_rate=50.0)
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), layerwise.parameters(), strict=True))


def test_equal_experts_need_no_fit(short_fit):
    moe = teacher(renormalize=True)
    with torch.no_grad():
        for name, tensor in equal_bank(4, d_ff=10, d_model=12).tensors():
            getattr(moe.moe_layers()[0], name).copy_(tensor)
    images = torch.randn(4, 3, 16, 16)
    for method in gathering_methods()[4:]:
        student, _ = integrate(moe, method, calibration=calibration())
        torch.testing.assert_close(student.eval()(images), moe(images), atol=1e-4, rtol=1e-4)


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
        (lambda: integrate(teacher(), "zero_ffn", rank=2), "rank: control 'zero_ffn' takes no option but d_ff"),
        (lambda: integrate(teacher(), "one_expert", d_ff=20), "d_ff: control 'one_expert' takes no option"),
        (lambda: integrate(teacher(), "fit"), "calibration: expected data, which 'fit' needs here, found None"),
        (lambda: integrate(teacher(), "joint_fit"), "calibration: expected data, which 'joint_fit' needs"),
        (
            lambda: integrate(teacher(), "joint_fit", calibration=calibration(), rank=2),
            "rank: method 'joint_fit' takes no option but steps and d_ff",
        ),
        (
            lambda: integrate(teacher(), "joint_fit", calibration=calibration(), steps=0),
            "steps: expected a positive number, found 0",
        ),
        (
            lambda: integrate(teacher().train(), "fit", calibration=calibration()),
            "model: expected eval mode",
        ),
        (lambda: routers(teacher(slots_per_expert=2)), "expected a teacher whose experts are chosen by a top-k router"),
        (lambda: Distillation(augmentations=-1), "augmentations: expected a number of at least 0, found -1"),
        (lambda: Distillation(depth_weights=(1.0, -1.0)), "depth_weights: expected numbers of at least 0"),
        (
            lambda: hidden_error([torch.ones(2)] * 2, [torch.ones(2)] * 2, [1.0]),
            "depth_weights: expected student, teacher and weights of the same number of depths, found 2, 2 and 1",
        ),
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


def test_kl_is_the_mean_over_the_teachers_passes():
    student, one, two, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    task = F.cross_entropy(student, labels)
    expected = 0.5 * task + 0.25 * (soft_kl(student, one, 2.0) + soft_kl(student, two, 2.0))
    torch.testing.assert_close(Distillation(2.0, 0.5).loss(task, student, one, two), expected)


def test_hidden_error_by_hand():
    """Depth 1: one of four elements is off by 2 of |t|^2 = 16; depth 2: student zero, error 1."""
    target = [torch.full((2, 2), 2.0), torch.tensor([3.0, 4.0])]
    student = [torch.tensor([[2.0, 2.0], [2.0, 4.0]]), torch.zeros(2)]
    assert hidden_error(student, target).item() == pytest.approx((4 / 16 + 1) / 2)
    assert hidden_error(student, target, [2.0, 0.5]).item() == pytest.approx((2 * 4 / 16 + 0.5) / 2)


@pytest.mark.parametrize("share_depth", [True, False])
def test_hidden_states_are_the_stream_after_every_block(share_depth):
    moe, images = teacher(share_depth=share_depth), torch.randn(2, 3, 16, 16)
    states = HiddenStates(moe)
    moe(torch.zeros(2, 3, 16, 16))  # of the last pass alone
    moe(images)
    states.close()
    moe(torch.zeros(2, 3, 16, 16))
    x = moe._pos_embed(moe.patch_embed(images))
    for block, seen in zip(moe.blocks, states.last, strict=True):
        x = block(x)
        torch.testing.assert_close(seen, x)


def test_sampled_experts_are_drawn_inside_the_context_alone():
    moe, images = teacher(), torch.randn(2, 3, 16, 16)
    plain = moe(images)
    with sampled_experts(moe):
        drawn = [moe(images) for _ in range(2)]
    assert not torch.equal(drawn[0], plain)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(moe(images), plain)


def test_adapted_routers_lower_the_loss_and_move_alone():
    moe, images, target = teacher(), torch.randn(8, 3, 16, 16), torch.randn(8, 7)
    with torch.no_grad():
        moe.head.weight.normal_()
    moe.requires_grad_(False)
    for router in routers(moe):
        router.top_k = 4
    before = {name: p.clone() for name, p in moe.named_parameters()}

    def loss():
        return soft_kl(moe(images), target, 1.0)

    losses = [loss().item()]
    for _ in range(20):
        adapt_routers(moe, loss, 0.02)
        losses.append(loss().item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in moe.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"blocks.0.mlp.router.weight"}
    assert not any(p.requires_grad for p in moe.parameters())
