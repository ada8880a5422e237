"""One epoch of training, and what guards it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from processor.micro_batch import backward_in_parts
from solver import base_lr, frac_unmoved, sampled_weights
from solver.skip import skips_by_itself
from utils.batch import Batch
from utils.dist import from_all, unwrapped
from utils.errors import InputError
from utils.losses import REPORTED, is_loss, total_loss
from utils.progress import progress_bar

logger = logging.getLogger("IRRA.train")


@dataclass
class Steps:
    """How the steps of an epoch are taken, and where in it they begin."""

    log_period: int = 100  # steps between two log lines; an epoch of fewer has one, at its end
    batch_size: int | None = None  # for the speed that is shown
    micro_batch: int | None = None  # samples that have activations at a time; the losses stay the same
    max_grad_norm: float | None = None
    start: int = 0  # the steps that an interrupted run has done
    meters: "Meters | None" = None  # their Meters
    watch: "FiniteWatch | None" = None  # of this epoch, for a caller whose after_step saves: it looks first
    before_step: Callable | None = None  # called with the step's number, from 1
    after_step: Callable | None = None  # called with (step, meters); may raise to leave


def train_one_epoch(model, loader, optimizer, device, epoch, steps=None):
    """One pass over the loader, whose batches model.forward takes. Returns the epoch's averages by name, and
    `frac_unmoved`, the fraction of weights that the last logged step left as they were.

    steps: a Steps. Raises NotFinite, before the step is taken, when the loss or a gradient is not a number.
    """
    model.train()
    how = steps or Steps()
    meters = how.meters or Meters()
    watch = how.watch or FiniteWatch(model, optimizer, epoch, look_period(device, how.log_period))
    last, began, step = how.start + len(loader), time.monotonic(), how.start
    samples = how.batch_size
    # images a second and the time that remains in this epoch
    bar = progress_bar(last - step, f"epoch {epoch}", unit="img", unit_scale=how.batch_size or 1)
    for batch in loader:  # neither counted nor with the bar round it: both would hold the last batch
        step, batch = step + 1, Batch.of(batch)
        samples = batch.samples
        if not samples:  # all its images were left out
            continue
        if how.before_step:
            how.before_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss, report = backward(model, batch, device, how.micro_batch)
        watch.before_step(step, loss, report, batch)
        if how.max_grad_norm:
            clip_gradients(model, how.max_grad_norm)
        if step % how.log_period:
            optimizer.step()
        else:
            meters.latest["frac_unmoved"] = step_and_compare(optimizer, unwrapped(model))
        meters.update({"loss": loss, **report}, samples)
        del batch, loss, report  # else they are on the device until the next ones are there
        bar.update()
        if step % how.log_period == 0:
            log_losses(f"Epoch[{epoch}] Iteration[{step}/{last}]", meters.averages(), optimizer)
        if how.after_step:
            how.after_step(step, meters)
    bar.close()
    watch.look()
    averages = meters.averages()
    if last < how.log_period:
        log_losses(f"Epoch[{epoch}] Iteration[{step}/{last}]", averages, optimizer)
    logger.info(f"Epoch {epoch} done.{speed_of(step - how.start, began, how.batch_size or samples)}")
    return {**averages, **meters.latest}


def log_losses(where, averages, optimizer):
    """As the published log shows them: averages of 0 are left out."""
    shown = [f"{name}: {value:.4f}" for name, value in averages.items() if value and name != "temperature"]
    logger.info(", ".join([where, *shown, f"Base Lr: {base_lr(optimizer):.2e}"]))


def speed_of(steps, began, batch_size):
    """What the end of an epoch says of its speed; nothing where it was stopped after its last batch."""
    if not steps:
        return ""
    seconds = max(time.monotonic() - began, 1e-9) / steps
    return f" Time per batch: {seconds:.3f}[s] Speed: {batch_size / seconds:.1f}[samples/s]"


def backward(model, batch, device, micro_batch=None):
    """Leave the gradients of a Batch in the parameters; returns the sum of its losses, and its report."""
    parts = [part.planned().to(device) for part in batch.parts(micro_batch)]
    if micro_batch:
        report = backward_in_parts(unwrapped(model), parts)
        return total_loss(report), report
    report = model(parts[0])
    loss = total_loss(report)
    loss.backward()
    return loss, report


def step_and_compare(optimizer, model):
    """Take the step; returns the fraction of weights that it left as they were, a number."""
    before = sampled_weights(model)
    optimizer.step()
    return float(frac_unmoved(model, before))


def clip_gradients(model, max_norm):
    """torch.nn.utils.clip_grad_norm_, but gradients in fp16 are added up and scaled in fp32: their norm may
    be above 65504, and then the step would be 0 without a word."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if all(gradient.element_size() >= 4 for gradient in gradients):
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    scale = (max_norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.copy_(gradient.float() * scale)


class Meters:
    """Averages over an epoch of whatever the model reports; the sums stay on the device until they are read.

    Weighted by batch size as published, but for mlm_acc, whose batches all weigh the same.
    """

    def __init__(self):
        self.names, self.sums, self.weights = [], None, None
        self.latest = {}  # numbers that are not averaged

    def update(self, report, batch_size):
        """report: named numbers, tensors of one element."""
        if not self.names:
            known = [name for name in REPORTED if name in report]
            self.names = known + [name for name in report if name not in REPORTED]
        weights = [1.0 if name == "mlm_acc" else batch_size for name in self.names]
        values = [report[name].detach().double() for name in self.names]
        # times numbers, not a tensor made on the host, for which it would have to wait
        weighted = torch.stack([value * weight for value, weight in zip(values, weights, strict=True)])
        weights = torch.tensor(weights, dtype=torch.float64)
        self.sums = weighted if self.sums is None else self.sums.to(weighted.device) + weighted
        self.weights = weights if self.weights is None else self.weights + weights

    def averages(self):
        """{name: average}; on an accelerator this waits for it."""
        if not self.names:
            return {}
        return dict(zip(self.names, (self.sums.cpu() / self.weights).tolist(), strict=True))

    def state_dict(self):
        if not self.names:
            return {}
        sums, weights = self.sums.tolist(), self.weights.tolist()
        return {"names": self.names, "sums": sums, "weights": weights, "latest": dict(self.latest)}

    @classmethod
    def from_state(cls, state):
        meters = cls()
        if state:
            meters.names = list(state["names"])
            meters.sums = torch.tensor(state["sums"], dtype=torch.float64)
            meters.weights = torch.tensor(state["weights"], dtype=torch.float64)
            meters.latest = dict(state.get("latest", {}))
        return meters


class NotFinite(InputError):
    """The loss or a gradient is not a number. `evidence` is what is needed to look at it, plain data."""

    def __init__(self, evidence):
        self.evidence = evidence
        losses = ", ".join(f"{name} {value:.4g}" for name, value in evidence["losses"].items())
        super().__init__(
            f"loss or gradient is no longer a number in epoch {evidence['epoch']}, iteration "
            f"{evidence['iteration']} ({losses}); the step was not taken. Try --precision bf16, "
            "--max_grad_norm 1 or a lower --lr (fp16 also needs Adam's eps of 1e-3)"
        )


def whole_batch(ids):
    """What tells the samples of a batch, as lists; of all processes' shares in order."""
    shares = from_all({key: values.tolist() for key, values in ids.items()})
    return {key: [row for share in shares for row in share[key]] for key in ids}


def look_period(device, log_period):
    """Steps between two looks of the host: on a CPU, which computes at once, each; else when it logs."""
    return 1 if device.type == "cpu" else log_period


def size_of(gradients):
    """A number that is finite where all gradients are: the largest magnitude."""
    if all(gradient.device.type == "cpu" for gradient in gradients):
        # the 2-norm is found nine times as fast there; but it overflows where no gradient does
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            return norm
    return torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))


class FiniteWatch:
    """Keeps steps with a loss or gradient that is not finite from being taken.

    The optimiser is told through `found_inf`, as torch.amp's GradScaler tells it: then the step is left out
    on the device, so that the host need not wait. Every `period` steps the host looks whether that happened.
    Of the steps in between it keeps the ids; losses are kept of the first bad one only, on the device.
    """

    def __init__(self, model, optimizer, epoch, period):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.epoch = optimizer, epoch
        self.fused = skips_by_itself(optimizer)
        self.skips = self.fused or hasattr(optimizer, "found_inf")  # solver.skip; others refuse it
        self.period = period if self.skips else 1
        self.first, self.names, self.losses = None, (), None  # the first bad step of this period, its losses
        self.ids = {}  # of each step since the last look
        # 1 on the device where the step now taken changes nothing; None where the host looks before each;
        # optimizer.found_inf does not say it afterwards: solver.skip takes it away before the step
        self.left_out = None

    def before_step(self, step, loss, report, batch):
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        finite = torch.isfinite(loss.detach()) & torch.isfinite(size_of(gradients))
        self.names = [name for name in report if is_loss(name)]
        losses = torch.stack([report[name].detach() for name in self.names])
        if self.first is None:
            self.first, self.losses = torch.full_like(loss, torch.inf).detach(), torch.zeros_like(losses)
        is_first = ~finite & self.first.isinf()
        self.losses = torch.where(is_first, losses, self.losses)
        self.first = torch.where(is_first, float(step), self.first)
        if self.skips and self.period > 1:  # else the host looks before the step is taken
            # a fused optimiser counts the steps that it takes on the device; another one has to stand still
            # from the first bad step on, since its next would be corrected for a step too many
            bad = ~finite if self.fused else self.first.isfinite()
            self.optimizer.found_inf = self.left_out = bad.float()
        self.ids[step] = Batch.of(batch).ids()
        if step % self.period == 0:
            self.look()

    def look(self):
        """Wait for the device; raises NotFinite when a step since the last look was bad."""
        ids, self.ids = self.ids, {}
        if ids and (first := float(self.first)) in ids:
            losses = dict(zip(self.names, self.losses.tolist(), strict=True))
            raise NotFinite(
                {"epoch": self.epoch, "iteration": int(first), "losses": losses, **whole_batch(ids[first])}
            )
