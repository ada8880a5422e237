"""Rates, groups and schedules against the published ones."""

import json

import pytest
import torch
from torch import nn

from model.irra import IRRA
from model.pretrained import VIT_B_16, new_clip
from solver import build_lr_scheduler, build_optimizer
from solver.build import lr_at, param_groups
from tests.recipe import arguments, figures, tiny_model
from utils.options import get_args


def schedule_id(case):
    return f"{case['mode']}-{case['warmup_method']}-{case['num_epoch']}"


SCHEDULES = [pytest.param(case, id=schedule_id(case)) for case in figures("lr_schedules")]


class TwoGroups(nn.Module):
    """Two parameters, which the rules give the base rate and lr_factor times it."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Parameter(torch.ones(2))
        self.cross = nn.Parameter(torch.ones(2))


def options(**values):
    return get_args(arguments(**values))


def options_of(case, **more):
    names = ("num_epoch", "warmup_epochs", "warmup_factor", "warmup_method", "milestones", "gamma", "power")
    rest = {name: case[name] for name in (*names, "lr", "target_lr", "lr_factor")}
    return options(lrscheduler=case["mode"], **rest, **more)


# ---- the schedule ----


@pytest.mark.parametrize("case", SCHEDULES)
def test_the_stepped_schedule_gives_the_published_rates(case):
    args = options_of(case)
    optimizer = build_optimizer(args, TwoGroups())
    scheduler = build_lr_scheduler(args, optimizer)
    found = []
    for _ in range(61):
        found.append([group["lr"] for group in optimizer.param_groups])
        assert scheduler.get_last_lr() == found[-1]
        optimizer.step()
        scheduler.step()
    plain, cross = zip(*found, strict=True)
    assert len(case["lr_at"]) == 61
    assert plain == pytest.approx(case["lr_at"], rel=1e-12, abs=0)
    assert cross == pytest.approx(case["lr_at_times_lr_factor"], rel=1e-12, abs=0)


def test_the_defaults_are_the_recipes():
    """Cosine to 0 in 60 epochs after a linear warm-up of 5, as --num_epoch 60 alone gives it."""
    args = options()
    optimizer = build_optimizer(args, TwoGroups())
    scheduler = build_lr_scheduler(args, optimizer)
    case = next(c for c in figures("lr_schedules") if schedule_id(c) == "cosine-linear-60")
    for expected in case["lr_at"]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12, abs=0)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("mode", ["step", "exp", "poly", "cosine", "linear"])
@pytest.mark.parametrize("num_epoch", [1, 4, 5])
def test_a_run_may_end_within_its_warm_up(mode, num_epoch):
    args = options(lrscheduler=mode, num_epoch=num_epoch, warmup_epochs=5)
    optimizer = build_optimizer(args, TwoGroups())
    scheduler = build_lr_scheduler(args, optimizer)
    for epoch in range(num_epoch):
        a = epoch / 5
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 * (0.1 * (1 - a) + a), rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("mode", ["step", "exp", "poly", "cosine", "linear"])
def test_without_warm_up_the_first_epoch_has_the_schedules_first_rate(mode):
    first = {"poly": 1e-5 * 0.9}.get(mode, 1e-5)  # power^(1 − r) is power at r = 0, as published
    assert lr_at(0, 1e-5, 60, lrscheduler=mode, warmup_epochs=0) == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("case", SCHEDULES[::3])
def test_a_restored_schedule_goes_on_as_an_unbroken_one(case):
    args = options_of(case)

    def fresh():
        optimizer = build_optimizer(args, TwoGroups())
        return optimizer, build_lr_scheduler(args, optimizer)

    optimizer, scheduler = fresh()
    for _ in range(13):
        optimizer.step()
        scheduler.step()
    saved = json.loads(json.dumps(scheduler.state_dict()))  # plain numbers only
    again, restored = fresh()
    restored.load_state_dict(saved)
    for _ in range(13, 40):
        assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]
        assert restored.get_last_lr() == scheduler.get_last_lr()
        for each, its_optimizer in ((scheduler, optimizer), (restored, again)):
            its_optimizer.step()
            each.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(case["lr_at"][40], rel=1e-12, abs=0)


def rates_within(args, shares):
    """The groups' rates of two epochs at these shares of an epoch, and the scheduler."""
    optimizer = build_optimizer(args, TwoGroups())
    scheduler, found = build_lr_scheduler(args, optimizer), []
    for _ in range(2):
        for done in shares:
            scheduler.within_epoch(done)
            found.append([group["lr"] for group in optimizer.param_groups])
            assert scheduler.get_last_lr() == found[-1]
            optimizer.step()
        scheduler.step()
    return found, scheduler


@pytest.mark.parametrize("mode", ["step", "exp", "poly", "cosine", "linear"])
def test_a_rate_per_step_is_the_schedule_at_a_fraction_of_the_epoch(mode):
    given = dict(lrscheduler=mode, num_epoch=2, warmup_epochs=1, milestones=[1], lr_factor=3, target_lr=1e-7)
    found, scheduler = rates_within(options(lr_per="step", **given), [0, 0.25, 0.5, 0.75])
    settings = {k: v for k, v in given.items() if k != "lr_factor"}
    for (plain, cross), epoch in zip(found, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75], strict=True):
        assert plain == lr_at(epoch, 1e-5, **settings)
        assert cross == lr_at(epoch, 1e-5 * 3, **settings)
    assert [plain for plain, _ in found[:5]] == pytest.approx([1e-6, 3.25e-6, 5.5e-6, 7.75e-6, found[4][0]])
    assert (len({plain for plain, _ in found[4:]}) == 1) == (mode == "step")
    assert scheduler.state_dict().keys() == {"last_epoch", "base_lrs"}  # as before: either can go on


def test_published_rates_do_not_change_within_an_epoch():
    found, _ = rates_within(options(num_epoch=2, warmup_epochs=1), [0, 0.5, 0.75])
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]


# ---- the groups ----


def full_model_on_paper():
    with torch.device("meta"):
        return IRRA(new_clip(VIT_B_16, (384, 128), 16), ("sdm", "mlm", "id"), 11003)


def test_every_parameter_has_the_published_rate_and_decay():
    model = full_model_on_paper()
    groups = param_groups(options(loss_names="sdm+mlm+id"), model)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: [list(p.shape), *settings[id(p)]] for name, p in model.named_parameters()}
    published = figures("optimizer_groups")
    assert list(found) == list(published)
    assert found == published
    assert sum(len(group["params"]) for group in groups) == len(published)


def test_parameters_share_a_handful_of_groups():
    args = options(loss_names="sdm+mlm+id")
    assert len(param_groups(args, full_model_on_paper())) <= 10
    optimizer = build_optimizer(args, tiny_model())
    assert len(optimizer.param_groups) <= 10


def test_factors_and_decays_reach_their_parameters():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Linear(1, 1)
            self.cross_attn = nn.Linear(1, 1)
            self.classifier = nn.Linear(1, 1)
            self.mlm_head = nn.Linear(1, 1)

    model = Named()
    given = dict(lr=1, lr_factor=3, bias_lr_factor=7, weight_decay=0.5, weight_decay_bias=0.25)
    groups = param_groups(options(**given), model)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert {name: settings[id(p)] for name, p in model.named_parameters()} == {
        "conv.weight": (1, 0.5),
        "conv.bias": (7, 0.25),
        "cross_attn.weight": (3, 0.5),
        "cross_attn.bias": (7, 0.25),  # bias wins over cross
        "classifier.weight": (3, 0.5),
        "classifier.bias": (3, 0.25),  # classifier wins over bias, whose decay stays
        "mlm_head.weight": (3, 0.5),
        "mlm_head.bias": (3, 0.25),
    }


def test_frozen_parameters_are_in_no_group():
    model = TwoGroups()
    model.cross.requires_grad_(False)
    groups = param_groups(options(), model)
    assert [p is model.plain for group in groups for p in group["params"]] == [True]


# ---- the optimisers ----


def test_adam_has_the_published_settings():
    defaults = build_optimizer(options(), TwoGroups()).defaults
    published = figures("state_dict_counts")["adam_defaults"]
    how_it_is_computed = {"foreach", "fused", "capturable", "differentiable"}  # not what
    for name in set(published) & set(defaults) - how_it_is_computed:  # an older PyTorch knows fewer names
        found = list(defaults[name]) if name == "betas" else defaults[name]
        assert found == published[name], name
    assert (defaults["betas"], defaults["eps"]) == ((0.9, 0.999), 1e-3)


def test_optimisers_are_what_their_options_say():
    adam = build_optimizer(options(alpha=0.8, beta=0.95), TwoGroups())
    assert type(adam) is torch.optim.Adam and adam.defaults["betas"] == (0.8, 0.95)
    adamw = build_optimizer(options(optimizer="AdamW", alpha=0.7), TwoGroups())
    assert type(adamw) is torch.optim.AdamW
    assert adamw.defaults["eps"] == 1e-8 and adamw.defaults["betas"] == (0.7, 0.999)
    sgd = build_optimizer(options(optimizer="SGD", momentum=0.6), TwoGroups())
    assert type(sgd) is torch.optim.SGD
    assert [sgd.defaults[name] for name in ("momentum", "dampening", "nesterov")] == [0.6, 0, False]


def test_an_optimiser_is_found_in_any_spelling_and_a_wrong_one_is_refused(capsys):
    assert options(optimizer="Adamw").optimizer == "AdamW"  # as the published help writes it
    with pytest.raises(SystemExit) as stop:
        options(optimizer="Adagrad")
    assert stop.value.code == 2
    assert "Adam, SGD, AdamW" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Adam", "SGD", "AdamW"])
def test_two_steps_follow_the_formula(name):
    """On one number: coupled decay in Adam and SGD, decoupled in AdamW; eps outside the root."""
    lr, decay, eps = 0.01, 0.1, {"Adam": 1e-3, "AdamW": 1e-8}.get(name)
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = build_optimizer(options(optimizer=name, lr=lr, weight_decay=decay), model)
    x, m, v = 2.0, 0.0, 0.0
    for step, gradient in ((1, 0.003), (2, -0.002)):
        model.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        if name == "AdamW":
            x -= lr * decay * x
        else:
            gradient += decay * x
        if name == "SGD":
            m = 0.9 * m + gradient
            x -= lr * m
        else:
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            x -= lr * m / (1 - 0.9**step) / ((v / (1 - 0.999**step)) ** 0.5 + eps)
        assert model.weight.item() == pytest.approx(x, rel=1e-9)
