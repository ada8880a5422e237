"""What a contributor adds, added as the README says: it works everywhere at once, or fails at once."""

import logging
import re

import pytest
import torch
from torch import nn

from datasets import build_dataloader
from datasets.image_text import PairDataset
from datasets.synthetic import make_dataset
from model import build, build_model, objectives
from model.irra import IRRA, PARTS, Part
from processor.micro_batch import backward_in_parts
from processor.trainer import FiniteWatch, Meters, Steps, train_one_epoch
from solver import base_lr, build_lr_scheduler, build_optimizer
from solver import build as build_of_solver
from solver.build import OPTIMIZERS, lr_and_decay, lr_at
from solver.restore import load_optimizer
from tests import processes
from tests.children import draw, words
from tests.processes import together
from tests.recipe import tiny_args, tiny_model
from tests.test_micro_batch import assert_same, taken, whole
from utils.batch import Batch
from utils.errors import InputError
from utils.losses import LOSSES, Loss, named, total_loss
from utils.options import get_args


def compute_l2(image_features, text_features, pids, weight=0.01):
    """A new loss: squared distances of pairs; the argument with a default is its own."""
    return weight * (image_features - text_features).square().sum(dim=1).mean() + 0 * pids.sum()


@pytest.fixture
def new_loss(monkeypatch):
    """The README's two steps: a function in model/objectives.py, a row in utils/losses.py."""
    monkeypatch.setattr(objectives, "compute_l2", compute_l2, raising=False)
    monkeypatch.setitem(LOSSES, "l2", Loss())
    objectives.needs.cache_clear()
    yield "l2"
    objectives.needs.cache_clear()


def test_a_new_loss_is_an_option_a_report_and_a_term_of_the_total(new_loss):
    assert get_args(["--loss_names", "sdm+l2"]).loss_names == "sdm+l2"
    model, batch = tiny_model("sdm+id+l2"), tiny_batch()
    report = model(batch)
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["caption_ids"])
    assert report["l2_loss"].item() == pytest.approx(compute_l2(image, text, batch["pids"]).item(), rel=1e-5)
    terms = [report[name].item() for name in ("sdm_loss", "id_loss", "l2_loss")]
    assert total_loss(report).item() == pytest.approx(sum(terms), rel=1e-6)


def tiny_batch():
    from tests.test_exactness import batch_of

    return batch_of(0)


def test_a_new_loss_trains_and_is_averaged(new_loss):
    args = tiny_args("l2", lr=1e-3)
    model = tiny_model("l2", lr=1e-3)
    optimizer, loader = build_optimizer(args, model), [tiny_batch()] * 4
    first = train_one_epoch(model, loader[:1], optimizer, torch.device("cpu"), 1)
    last = train_one_epoch(model, loader, optimizer, torch.device("cpu"), 2)
    assert last["l2_loss"] == last["loss"] < first["l2_loss"] == first["loss"]


@pytest.mark.parametrize(("log_period", "lines"), [(2, ["2/3"]), (3, ["3/3"]), (100, ["3/3"])])
def test_an_epoch_shorter_than_the_log_period_is_logged_too(log_period, lines, new_loss, monkeypatch, caplog):
    """And a loss below zero as any other."""
    monkeypatch.setattr(objectives, "compute_l2", lambda image_features, pids: image_features.sum() * 0 - 7)
    monkeypatch.setattr(logging.getLogger("IRRA"), "propagate", True)
    model = tiny_model("l2")
    with caplog.at_level(logging.INFO, "IRRA.train"):
        steps = (model, [tiny_batch()] * 3, build_optimizer(tiny_args("l2"), model), torch.device("cpu"), 1)
        train_one_epoch(*steps, Steps(log_period=log_period))
    said = re.findall(r"Iteration\[(\S+)\], loss: -7.0000, l2_loss: -7.0000, Base Lr", caplog.text)
    assert said == lines


def test_a_new_loss_is_exact_in_micro_batches(new_loss):
    model, batch = tiny_model("sdm+l2+mlm").double(), tiny_batch()
    batch["images"] = batch["images"].double()
    parts = [part.planned() for part in Batch.of(batch).parts(3)]
    assert_same(taken(model, backward_in_parts(model, parts)), whole(model, batch))


def test_a_new_loss_is_the_same_in_two_processes(tmp_path):
    data = draw(tmp_path)
    argv = [str(word) for word in words(data, tmp_path, loss_names="sdm+l2", epochs=1)]
    (one,), two = (together(n, processes.train_with_loss, "l2", compute_l2, argv) for n in (1, 2))
    assert len(one["reports"]) == len(two[0]["reports"]) > 1
    for alone, shared in zip(one["reports"], two[0]["reports"], strict=True):
        assert shared["l2_loss"] == pytest.approx(alone["l2_loss"], rel=1e-5) and alone["l2_loss"] > 0


def test_a_setting_of_a_loss_comes_from_the_command_line(new_loss, monkeypatch):
    def compute_l2(image_features, text_features, margin):
        return (image_features - text_features).square().mean() + margin

    monkeypatch.setattr(objectives, "compute_l2", compute_l2)
    with pytest.raises(KeyError, match=r"asks for margin, and there is .*options=\('margin',\) in its row"):
        build_model(tiny_args("l2", margin=5), 7)
    monkeypatch.setitem(LOSSES, "l2", Loss(options=("margin",)))
    model = build_model(tiny_args("l2", margin=5), 7)
    assert 5 < model(tiny_batch())["l2_loss"].item() < 50


def test_a_default_that_an_option_would_never_change_is_an_error(new_loss, monkeypatch):
    monkeypatch.setattr(objectives, "compute_l2", lambda image_features, margin=0.3: image_features.sum())
    with pytest.raises(KeyError, match="compute_l2 would never see --margin"):
        build_model(tiny_args("l2"), 7)


def test_a_loss_without_a_row_is_an_error_and_not_left_out():
    with pytest.raises(KeyError, match="odd_loss is reported, but LOSSES in utils/losses.py"):
        total_loss({"sdm_loss": 1.0, "odd_loss": 2.0})


def test_a_number_of_ones_own_is_averaged_after_the_known_ones():
    meters = Meters()
    meters.update({"mine": torch.tensor(3.0), "sdm_loss": torch.tensor(1.0), "loss": torch.tensor(1.0)}, 2)
    assert list(meters.averages()) == ["loss", "sdm_loss", "mine"]


def test_a_key_of_ones_own_travels_with_the_batch(tmp_path, monkeypatch):
    plain = PairDataset.__getitems__
    own = lambda dataset, keys: {**(batch := plain(dataset, keys)), "mine": batch["indices"] * 10}  # noqa: E731
    monkeypatch.setattr(PairDataset, "__getitems__", own)
    make_dataset(tmp_path, "CUHK-PEDES", 4, 2, 2, 2)
    args = tiny_args(root_dir=tmp_path, num_workers=0, batch_size=4, division=True)
    for batch in build_dataloader(args)[0]:
        (whole,) = batch.parts()
        assert torch.equal(whole.to(torch.device("cpu"))["mine"], batch.indices * 10)


# ---- heads ----


class WithEmbedding(IRRA):
    """A second embedding on top of the image's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = nn.Linear(self.width, self.width)


def two_parts():
    model = IRRA.__new__(IRRA)
    nn.Module.__init__(model)
    model.classifier, model.second = nn.Linear(2, 2), nn.Linear(2, 2)
    return model


def test_a_head_without_a_rule_fails_and_says_what_to_do():
    with pytest.raises(KeyError, match="second.weight has no learning rate: give second a row in PARTS"):
        build_optimizer(get_args([]), two_parts())


def test_a_head_says_its_rate_where_it_is_defined(monkeypatch):
    monkeypatch.setitem(PARTS, "second", Part(None, lr_factor=100.0, encodes=True))
    args, model = get_args(["--lr", "1e-5"]), two_parts()
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in build_optimizer(args, model).param_groups
        for p in group["params"]
    }
    assert rates[id(model.second.weight)] == (pytest.approx(1e-3), args.weight_decay)
    assert rates[id(model.second.bias)] == (pytest.approx(1e-3), args.weight_decay_bias)
    assert rates[id(model.classifier.weight)] == (5e-5, args.weight_decay)  # the published rule


def test_every_part_of_the_model_has_a_row_and_the_published_rule():
    args = tiny_args("+".join(named()), token_selection=True, learn_temperature=True)
    model = build_model(args, 7)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == set(PARTS)
    args = get_args([])
    for name, _ in model.named_parameters():
        if (row := PARTS[name.split(".")[0]]).lr is None and row.lr_factor is None:
            assert lr_and_decay(name, args, PARTS) == lr_and_decay(name, args)


def test_a_search_index_is_of_what_encodes(monkeypatch):
    from retrieval.encoders import fingerprint_of

    monkeypatch.setitem(PARTS, "second", Part(None, encodes=True))
    weights = {
        "base_model.a": torch.ones(2),
        "classifier.weight": torch.ones(2),
        "second.weight": torch.ones(2),
    }
    before = fingerprint_of(weights, (4, 2), 1)
    assert fingerprint_of({**weights, "classifier.weight": torch.zeros(2)}, (4, 2), 1) == before
    assert fingerprint_of({**weights, "second.weight": torch.zeros(2)}, (4, 2), 1) != before


class WithProxies(IRRA):
    """A point for each training person, a parameter of its own with a rate of its own."""

    def __init__(self, clip, loss_names, num_classes, *rest):
        super().__init__(clip, loss_names, num_classes, *rest)
        if "proxy" in self.loss_names:
            self.proxies = nn.Parameter(torch.zeros(num_classes, self.width))

    def gathered(self, found, known):
        return {**super().gathered(found, known), "proxies": getattr(self, "proxies", None)}


@pytest.fixture
def proxies(monkeypatch):
    def compute_proxy(image_features, pids, proxies):
        return nn.functional.cross_entropy(image_features @ proxies.t(), pids)

    monkeypatch.setattr(objectives, "compute_proxy", compute_proxy, raising=False)
    monkeypatch.setitem(LOSSES, "proxy", Loss())
    monkeypatch.setitem(PARTS, "proxies", Part("proxy", lr=0.5, encodes=True, of_persons=True))
    monkeypatch.setattr(build, "GIVEN", (*build.GIVEN, "proxies"))
    monkeypatch.setattr(build, "IRRA", WithProxies)


def test_what_has_a_row_a_person_is_rebuilt_without_the_classifier(proxies):
    args = tiny_args("proxy")
    weights = build_model(args, 7).state_dict()
    assert not any(name.startswith("classifier") for name in weights)
    tested = build.build_trained_model(args, weights, "best.pth")
    assert tested.proxies.shape == (7, tested.width)


def test_what_has_a_row_a_person_is_not_kept_of_another_file(proxies):
    model = build_model(tiny_args("proxy+simclr"), 7)
    theirs = {name: value + 1 for name, value in model.state_dict().items()}
    build.keep_heads(model, theirs, "start.pth")
    assert not model.proxies.any()
    assert torch.equal(model.simclr_mlp[0].bias, theirs["simclr_mlp.0.bias"])


def test_a_checkpoint_without_a_head_that_encodes_is_another_runs(proxies):
    weights = build_model(tiny_args("sdm"), 7).state_dict()
    with pytest.raises(
        InputError, match=r"best.pth holds no proxies, .* \(--loss_names proxy\): another run"
    ):
        build.build_trained_model(tiny_args("proxy"), weights, "best.pth")


def test_a_loss_that_asks_for_what_nobody_gives_says_where_it_is_to_come_from(new_loss, monkeypatch):
    monkeypatch.setattr(objectives, "compute_l2", lambda image_features, attributes: image_features.sum())
    with pytest.raises(KeyError, match="asks for attributes.*GIVEN.*Batch.known.*IRRA.features"):
        build_model(tiny_args("l2"), 7)


def test_the_rate_that_is_shown_is_that_of_lr_whichever_part_comes_first(proxies):
    args = tiny_args("proxy", lr=1e-3, warmup_epochs=0, num_epoch=4)
    optimizer = build_optimizer(args, build_model(args, 7))
    scheduler = build_lr_scheduler(args, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5 and base_lr(optimizer) == 1e-3
    optimizer.step()
    scheduler.step()
    assert base_lr(optimizer) == lr_at(1, 1e-3, 4, warmup_epochs=0)


# ---- optimisers and schedules ----


class Descent(torch.optim.Optimizer):
    """An optimiser of one's own, which knows nothing of `found_inf`."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


OWN = {
    "by hand": lambda groups, args, how: Descent(groups, args.lr),
    "Adafactor": lambda groups, args, how: torch.optim.Adafactor(groups, lr=args.lr),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_an_optimiser_of_ones_own_leaves_a_bad_step_out(own, monkeypatch):
    """On an accelerator, where the host does not look before each step."""
    monkeypatch.setitem(OPTIMIZERS, "Adam", own)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(tiny_args(), model)
    watch = FiniteWatch(model, optimizer, epoch=1, period=100)
    for step, size in ((1, 1.0), (2, torch.nan)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss = size * model(torch.ones(1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        watch.before_step(step, loss, {"sdm_loss": loss}, {"pids": torch.zeros(1)})
        optimizer.step()
        stood = all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
        assert stood == (step == 2)


def test_an_optimiser_whose_state_has_other_shapes_is_resumed(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "Adam", OWN["Adafactor"])
    model = nn.Linear(3, 2)
    optimizers = [build_optimizer(tiny_args(), model) for _ in range(2)]
    model(torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    load_optimizer(optimizers[1], optimizers[0].state_dict(), "last.pth")
    row_var = optimizers[1].state[model.weight]["row_var"]
    assert row_var.shape != model.weight.shape and torch.equal(
        row_var, optimizers[0].state[model.weight]["row_var"]
    )


def test_what_an_optimiser_counts_in_its_groups_is_resumed(monkeypatch):
    """As Prodigy and schedule-free ones do; PyTorch's count in the state of each parameter."""
    monkeypatch.setitem(OPTIMIZERS, "Adam", OWN["by hand"])
    first, again = (build_optimizer(tiny_args(lr=lr), nn.Linear(3, 2)) for lr in (1.0, 2.0))
    first.param_groups[0]["k"] = 7
    load_optimizer(again, first.state_dict(), "last.pth")
    assert (again.param_groups[0]["k"], again.param_groups[0]["lr"]) == (7, 2.0)


def test_settings_given_beside_resume_are_the_ones_that_it_steps_with():
    model = nn.Linear(3, 2)
    first, same, adamw = (
        build_optimizer(tiny_args(**settings), model)
        for settings in ({}, {"weight_decay": 0.5, "alpha": 0.25, "beta": 0.75}, {"optimizer": "AdamW"})
    )
    model(torch.ones(1, 3)).sum().backward()
    first.step()
    for optimizer in (same, adamw):
        wanted = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
        load_optimizer(optimizer, first.state_dict(), "last.pth")
        assert [{**group, "params": len(group["params"])} for group in optimizer.param_groups] == wanted
        moment = optimizer.state[model.weight]["exp_avg"]
        assert torch.equal(moment, first.state[model.weight]["exp_avg"]) and moment.abs().sum() > 0
    assert same.param_groups[0]["betas"] == (0.25, 0.75) and adamw.param_groups[0]["eps"] == 1e-8


@pytest.mark.parametrize("pair", [("Adam", "SGD"), ("SGD", "Adam")])
def test_another_optimisers_moments_are_refused(pair):
    model = nn.Linear(3, 2)
    before, now = (build_optimizer(tiny_args(optimizer=name), model) for name in pair)
    model(torch.ones(1, 3)).sum().backward()
    before.step()
    with pytest.raises(
        InputError, match="last.pth cannot be resumed: .* another optimiser's, see --optimizer"
    ):
        load_optimizer(now, before.state_dict(), "last.pth")


def test_a_setting_of_a_schedule_comes_from_the_command_line(monkeypatch):
    def lr_at(epoch, base_lr, num_epoch, gamma=0.5, margin=0.5):
        return base_lr * margin * gamma

    monkeypatch.setattr(build_of_solver, "lr_at", lr_at)
    args = tiny_args(lr=1.0, margin=3, gamma=2)
    optimizer = build_optimizer(args, nn.Linear(1, 1))
    assert build_lr_scheduler(args, optimizer).get_last_lr()[0] == 6
