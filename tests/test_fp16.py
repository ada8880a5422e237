"""The default recipe of a GPU, fp16 weights without loss scaling, against figures that the published code
gave in fp16 on a CPU (tests/reference/fp16; its README defines regimes, differences and tolerances).

What separates the published optimiser from a fused one are the weights that never move and the length of the
update: (1 - beta2)·g² is rounded to fp16, mostly to 0, before the root is taken. The fused one fails here.
"""

import functools
import hashlib

import numpy as np
import pytest
import torch

from benchmarks import published
from model import build_model
from processor.trainer import FiniteWatch, Steps, train_one_epoch
from solver import build_lr_scheduler, build_optimizer
from solver.build import lr_and_decay
from solver.restore import fit_groups, load_optimizer
from tests.recipe import (
    _folder,
    arrays,
    clip_weights,
    figures,
    fill_heads,
    off,
    pixels,
    tiny_args,
    tiny_model,
)
from tests.recipe import arguments as words_of
from utils.errors import InputError
from utils.losses import total_loss
from utils.options import get_args

MODEL = figures("fp16/model")
OPTIONS = MODEL["options"]
SIZES = {key: value for key, value in MODEL["model"].items() if key != "vocab"}
FP16_KINDS = MODEL["fp16_kinds"]
FC = "mlm_head.fc.weight"
CPU = torch.device("cpu")


def args_of(**more):
    path = _folder_file()
    return get_args(
        words_of(
            pretrain_choice=path,
            img_size=MODEL["img_size"],
            stride_size=MODEL["stride_size"],
            cmt_depth=MODEL["cmt_depth"],
            temperature=MODEL["temperature"],
            loss_names=MODEL["loss_names"],
            text_length=SIZES["context"],
            device="cpu",
            precision="fp16",
            **OPTIONS,
            **more,
        )
    )


@functools.cache
def _folder_file():
    from pathlib import Path

    path = Path(_folder().name) / "fp16_clip.pt"
    torch.save(clip_weights(**SIZES), path)
    return path


def new_model():
    model = build_model(args_of(), MODEL["num_classes"])
    return fill_heads(
        model, MODEL["loss_names"], SIZES["embed_dim"], MODEL["num_classes"], MODEL["cmt_depth"]
    )


def batches():
    stored = arrays("fp16/batches")
    ids = [
        {key: stored[key][i] for key in ("pids", "caption_ids", "mlm_ids", "mlm_labels")} for i in range(10)
    ]
    for batch, seed in zip(ids, MODEL["image_seeds"], strict=True):
        batch["images"] = pixels(seed, MODEL["image_shape"])
        if not MODEL["clean_captions"]:
            batch["caption_ids"] = batch["mlm_ids"].clone()
    return ids


# ---- the model ----


def test_the_full_model_has_the_published_types():
    published = figures("fp16/dtypes")
    args = get_args(
        words_of(
            pretrain_choice="random",
            precision="fp16",
            device="cpu",
            loss_names=published["loss_names"],
            img_size=published["img_size"],
            stride_size=published["stride_size"],
            cmt_depth=published["cmt_depth"],
        )
    )
    model = build_model(args, published["num_classes"])
    types = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
    assert types == {name: dtype for dtype in ("float32", "float16") for name in published[dtype]}
    numbers = {dtype: 0 for dtype in ("float32", "float16")}
    for parameter in model.parameters():
        numbers[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    assert numbers == {dtype: published[f"numel_{dtype}"] for dtype in numbers}
    assert len(types) == published["parameters"] == 367


def test_forward_is_the_published_one():
    published, model, batch = figures("fp16/forward"), new_model(), batches()[0]
    report = {name: value.item() for name, value in model(batch).items()}
    report["total_loss"] = sum(value for name, value in report.items() if "loss" in name)
    for name, expected in published["result"].items():
        slack = published["tolerance"]["losses"] if "loss" in name else 0
        assert report[name] == pytest.approx(expected, rel=slack), name
    model.eval()
    with torch.no_grad():
        found = {
            "encode_image": model.encode_image(batch["images"]),
            "encode_text": model.encode_text(batch["caption_ids"]),
        }
    for name, expected in arrays("fp16/forward").items():
        assert off(found[name], expected) < published["tolerance"]["features"], name


@pytest.mark.parametrize("regime", ["a", "b"])
def test_gradients_are_the_published_ones(regime):
    published, model = figures("fp16/grads"), new_model()
    tolerance = published["tolerance"]
    (total_loss(model(batches()[0])) * MODEL["loss_scale"][regime]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for kind, expected in published[regime]["kinds"].items():
        entries = torch.cat([gradients[name].double().flatten() for name in MODEL["kinds"][kind]])
        assert float(entries.norm()) == pytest.approx(expected["l2"], rel=tolerance["l2"]), kind
        assert float((entries == 0).double().mean()) == pytest.approx(
            expected["zeros"], abs=tolerance["zeros"]
        ), kind
        found = [
            float(gradients[n].flatten()[i]) for n, i in zip(expected["name"], expected["index"], strict=True)
        ]
        assert off(found, expected["value"]) < tolerance["values"], kind


# ---- the optimiser ----


class One(torch.nn.Module):
    """One fp16 tensor called weight: neither a bias nor a new layer."""

    def __init__(self, start):
        super().__init__()
        self.weight = torch.nn.Parameter(start)


ALONE = figures("fp16/optimizer")


def drawn(case):
    """(start, a generator of gradients) of a case; float16."""
    r = np.random.Generator(np.random.PCG64([ALONE["seed"], case]))

    def half(std):
        return torch.from_numpy(np.float16(std * r.standard_normal(ALONE["size"])))

    start = half(ALONE["weight_std"])
    return start, (half(ALONE["cases"][case]["gradient_std"]) for _ in range(ALONE["steps"]))


@functools.cache
def stepped(case, fused=False, device=CPU):
    """(start, end, share of weights that never moved) of a case by our optimiser or PyTorch's fused one."""
    start, gradients = drawn(case)
    start = start.to(device)
    model = One(start.clone())
    optimizer = build_optimizer(get_args(words_of(**ALONE["options"])), model)
    if fused:
        options = {**optimizer.param_groups[0], "foreach": False, "fused": True}
        options = {key: options[key] for key in ("params", "lr", "betas", "eps", "weight_decay", "fused")}
        optimizer = torch.optim.Adam([options.pop("params")[0]], **options)
    unmoved = torch.ones(len(start), dtype=torch.bool, device=device)
    for gradient in gradients:
        model.weight.grad = gradient.to(device)
        optimizer.step()
        unmoved &= model.weight.detach() == start
    return start.cpu(), model.weight.detach().cpu(), float(unmoved.double().mean())


def off_published(case, fused=False, device=CPU):
    """{unmoved, update_l2, distance} from the published figures, as the README there defines them."""
    start, end, unmoved = stepped(case, fused, device)
    published, stored = ALONE["cases"][case], arrays("fp16/optimizer")[f"final_{case}"]
    length = float((end.double() - start.double()).norm())
    update = float((stored.double() - start.double()).norm())
    return {
        "unmoved": abs(unmoved - published["unmoved"]),
        "update_l2": abs(length / published["update_l2"] - 1),
        "distance": float((end.double() - stored.double()).norm()) / update,
    }


CASES = range(len(ALONE["cases"]))


@pytest.mark.parametrize("case", CASES)
def test_cases_are_rebuilt_as_they_were(case):
    published, stored = ALONE["cases"][case], arrays("fp16/optimizer")[f"final_{case}"]
    start, gradients = drawn(case)
    assert start[:8].tolist() == published["start_first8"]
    assert next(gradients)[:8].tolist() == published["gradient_first8"]
    assert hashlib.sha256(stored.numpy().astype("<f2").tobytes()).hexdigest() == published["sha256"]


@pytest.mark.parametrize("case", CASES)
def test_the_optimiser_alone_ends_where_the_published_one_does(case):
    tolerance = ALONE["cases"][case]["tolerance"]
    for figure, difference in off_published(case).items():
        assert difference <= tolerance[figure], figure


@pytest.mark.parametrize("case", CASES)
def test_a_fused_optimiser_ends_elsewhere(case):
    """What the test above would not let pass."""
    tolerance = ALONE["cases"][case]["tolerance"]
    assert any(difference > tolerance[figure] for figure, difference in off_published(case, True).items())


@pytest.mark.parametrize("name", ["Adam", "SGD", "AdamW"])
def test_what_is_fused_is_asked_of_the_weights(name):
    args = get_args(words_of(optimizer=name))
    for dtype, how in ((torch.float16, "foreach"), (torch.float32, "fused"), (torch.float64, "fused")):
        model = One(torch.zeros(3, dtype=dtype))
        model.bias = torch.nn.Parameter(torch.zeros(2))  # as a normalisation's: fp32 among fp16
        optimizer = build_optimizer(args, model)
        assert type(optimizer) is getattr(torch.optim, name)
        assert {kind for kind in ("foreach", "fused") if optimizer.defaults[kind]} == {how}
        of_weight, *of_bias = optimizer.param_groups
        assert [p is model.weight for p in of_weight["params"]] == [True] and of_weight[how]
        assert all(group["fused"] and not group["foreach"] for group in of_bias)


def test_adamw_rounds_as_a_chain_too():
    """Nearer to what PyTorch gives one operation after the other than its fused step is."""
    args, (start, _) = get_args(words_of(optimizer="AdamW", lr=1e-3)), drawn(0)
    ends = {}
    for how in ("ours", "chain", "fused"):
        model = One(start.clone())
        options = dict(
            lr=args.lr, weight_decay=args.weight_decay, eps=1e-8, foreach=False, fused=how == "fused"
        )
        ours = how == "ours"
        optimizer = build_optimizer(args, model) if ours else torch.optim.AdamW([model.weight], **options)
        for step in range(20):  # of size 1: eps 1e-8 would divide by a second moment that rounds to 0
            model.weight.grad = (1.5 + torch.sin(torch.arange(len(start)) + step)).half()
            optimizer.step()
        ends[how] = model.weight.detach().double()
    distance = {how: float((ends[how] - ends["chain"]).norm()) for how in ends}
    assert distance["ours"] < 0.5 * distance["fused"]


# ---- training ----

TRAJECTORY = figures("fp16/trajectory")
STEPS, RANGES = (
    TRAJECTORY["steps"],
    {"losses_1_10": (0, 10), "losses_11_50": (10, 50), "losses_51_120": (50, 120)},
)


class Scaled(torch.nn.Module):
    """The model with its losses multiplied before backward, the regimes' loss scale; keeps the reports."""

    def __init__(self, model, scale):
        super().__init__()
        self.module, self.scale, self.reports = model, scale, []

    def forward(self, batch):
        report = self.module(batch)
        self.reports.append({name: value.item() for name, value in report.items() if "loss" in name})
        return {name: value * self.scale if "loss" in name else value for name, value in report.items()}


@functools.cache
def trained(regime, fused=False, device=CPU):
    """(losses by name, {steps: (unmoved, update_l2)}) of a run through the training loop, whose watch looks
    every 50 steps as on an accelerator."""
    model = new_model().to(device)
    scaled = Scaled(model, MODEL["loss_scale"][regime])
    optimizer = build_optimizer(args_of(), model)
    if fused:
        groups = [
            {key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups
        ]
        optimizer = torch.optim.Adam(groups, eps=1e-3, fused=True)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    unmoved = {
        name: torch.ones_like(p, dtype=torch.bool) for name, p in start.items() if p.dtype == torch.half
    }
    after = {}

    def look(step, meters):
        for name, parameter in model.named_parameters():
            if name in unmoved:
                unmoved[name] &= parameter.detach() == start[name]
        if str(step) in TRAJECTORY[regime]["after"]:
            after[str(step)] = shares(unmoved), lengths(start, dict(model.named_parameters()))

    loader = [batches()[step % 10] for step in range(STEPS)]
    watch = FiniteWatch(scaled, optimizer, epoch=1, period=50)
    train_one_epoch(
        scaled, loader, optimizer, device, 1, Steps(log_period=10**9, after_step=look, watch=watch)
    )
    losses = {name: [report[name] for report in scaled.reports] for name in scaled.reports[0]}
    losses["total_loss"] = [sum(report.values()) for report in scaled.reports]
    return losses, after


def shares(unmoved):
    """Share of weights that no step has moved: by kind, of all in fp16, and of all but the words' layer."""

    def share(names):
        names = [name for name in names if name in unmoved]
        return sum(int(unmoved[name].sum()) for name in names) / sum(unmoved[name].numel() for name in names)

    found = {kind: share(MODEL["kinds"][kind]) for kind in FP16_KINDS}
    return {**found, "all": share(unmoved), f"all but {FC}": share(name for name in unmoved if name != FC)}


def lengths(start, now):
    """Length of the update: by kind, and of all that is in fp16."""

    def length(names):
        return sum(float((now[n].detach().double() - start[n].double()).square().sum()) for n in names) ** 0.5

    found = {kind: length(names) for kind, names in MODEL["kinds"].items()}
    return {**found, "fp16": length(name for name in start if start[name].dtype == torch.half)}


def differences(regime, fused=False, device=CPU):
    """Largest difference of each kind of figure from the published run, as the README there defines it."""
    published, (losses, after) = TRAJECTORY[regime], trained(regime, fused, device)
    found = {
        key: max(off(losses[name][a:b], values[a:b]) for name, values in published["losses"].items())
        for key, (a, b) in RANGES.items()
    }
    totals = ("all", f"all but {FC}")
    unmoved = [
        (name, abs(after[at][0][name] - value))
        for at, figures_at in published["after"].items()
        for name, value in figures_at["unmoved"].items()
    ]
    updates = [
        (name, abs(after[at][1][name] / value - 1))
        for at, figures_at in published["after"].items()
        for name, value in figures_at["update_l2"].items()
    ]
    found["unmoved_total"] = max(difference for name, difference in unmoved if name in totals)
    found["unmoved_by_kind"] = max(difference for name, difference in unmoved if name not in totals)
    found["update_l2_fp16"] = max(difference for name, difference in updates if name == "fp16")
    found["update_l2_by_kind"] = max(difference for name, difference in updates if name != "fp16")
    return found


@pytest.mark.parametrize("regime", ["a", "b"])
def test_120_steps_follow_the_published_run(regime):
    for figure, difference in differences(regime).items():
        assert difference <= TRAJECTORY[regime]["tolerance"][figure], figure


@pytest.mark.parametrize("regime", ["a", "b"])
def test_with_a_fused_optimiser_they_do_not(regime):
    """The fault that this file is for: in the loss where gradients are small, in the weights always."""
    found, tolerance = differences(regime, fused=True), TRAJECTORY[regime]["tolerance"]
    failed = {figure for figure in found if found[figure] > tolerance[figure]}
    expected = {"unmoved_total", "unmoved_by_kind", "update_l2_fp16", "update_l2_by_kind"}
    assert failed >= expected | ({"losses_11_50", "losses_51_120"} if regime == "b" else set())


def test_a_checkpoint_does_not_say_how_a_step_is_computed(tmp_path):
    """A run of fp32, or one saved when fp16 was fused too, goes on in fp16 as the recipe has it."""
    for saved_in, loaded_in in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        args, optimizers = get_args([]), []
        for dtype in (saved_in, loaded_in):
            model = One(torch.ones(4, dtype=dtype))
            model.weight.grad = torch.full((4,), 0.5, dtype=dtype)
            optimizers.append(build_optimizer(args, model))
        optimizers[0].step()
        how = [{key: group[key] for key in ("fused", "foreach")} for group in optimizers[1].param_groups]
        load_optimizer(optimizers[1], optimizers[0].state_dict(), "last.pth")
        loaded = optimizers[1].param_groups
        assert [{key: group[key] for key in ("fused", "foreach")} for group in loaded] == how
        optimizers[1].step()
        (state,) = optimizers[1].state.values()
        assert float(state["step"]) == 2 and state["exp_avg"].dtype == loaded_in


@pytest.mark.parametrize(("saved_in", "going_on_in"), [("fp16", "bf16"), ("fp32", "fp16"), ("fp16", "fp16")])
@pytest.mark.parametrize("grouped", ["as now", "as once"])
def test_a_run_goes_on_in_another_precision(saved_in, going_on_in, grouped):
    """Parameter groups depend on the precision; moments find their parameters all the same, also from when
    fp16 had the groups of fp32. The advice after a NaN is to go on in bf16."""
    models, optimizers = [], []
    for precision in (saved_in, going_on_in):
        args = tiny_args(precision=precision)
        models.append(tiny_model(precision=precision))
        optimizers.append(build_optimizer(args, models[-1]))
        build_lr_scheduler(args, optimizers[-1])  # sets the initial rates
    if grouped == "as once":
        rules = {}
        for name, parameter in models[0].named_parameters():
            rules.setdefault(lr_and_decay(name, args), []).append(parameter)
        groups = [{"params": params, "lr": lr, "weight_decay": d} for (lr, d), params in rules.items()]
        optimizers[0] = torch.optim.Adam(groups, eps=1e-3, foreach=True)
    for number, parameter in enumerate(models[0].parameters()):
        parameter.grad = torch.full_like(parameter, 2.0 ** -(number % 12))
    optimizers[0].step()
    saved = optimizers[0].state_dict()
    fitted = fit_groups(optimizers[1], saved, models[1], models[0].state_dict(), "last.pth")
    load_optimizer(optimizers[1], fitted, "last.pth")
    for (name, before), after in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        found, expected = optimizers[1].state[after], optimizers[0].state[before]
        assert torch.equal(found["exp_avg"], expected["exp_avg"].to(after.dtype)), name
        assert found["exp_avg"].dtype == after.dtype and float(found["step"]) == 1
    rates = [{group["lr"] for group in optimizer.param_groups} for optimizer in optimizers]
    assert len(rates[1]) == len(rates[0])


def test_published_optimisers_and_damaged_ones_are_refused_still():
    model = tiny_model()
    optimizer = build_optimizer(tiny_args(), model)
    for saved, said in (
        (published.optimizer_of(tiny_args(), model).state_dict(), "the published code"),
        ({}, "damaged"),
    ):
        with pytest.raises(InputError, match=said):
            fit_groups(optimizer, saved, model, model.state_dict(), "best.pth")
