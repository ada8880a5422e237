"""One epoch of training, and what guards it."""

import logging
import time

import torch

from processor.micro_batch import backward_in_parts
from solver import frac_unmoved, sampled_weights
from utils.dist import from_all, rank, unwrapped
from utils.errors import InputError

logger = logging.getLogger("IRRA.train")
ORDER = ("loss", "sdm_loss", "itc_loss", "cmpm_loss", "id_loss", "mlm_loss", "img_acc", "txt_acc", "mlm_acc")


def train_one_epoch(
    model,
    loader,
    optimizer,
    device,
    epoch,
    log_period=100,
    batch_size=None,
    start=0,
    meters=None,
    max_grad_norm=None,
    after_step=None,
    micro_batch=None,
):
    """One pass over the loader, whose batches model.forward takes. Returns the epoch's averages by name, and
    `frac_unmoved`, the share of weights that the last logged step left as they were.

    start, meters: the steps of this epoch that an interrupted run has done, and its Meters.
    after_step: called with (step, meters) after each step; may raise to leave.
    micro_batch: samples that have activations at a time; the losses are those of the whole batch all the
    same. Raises NotFinite, before the step is taken, when the loss or a gradient is not a number.
    """
    model.train()
    meters = meters or Meters()
    watch = FiniteWatch(model, optimizer, epoch, period=1 if device.type == "cpu" else log_period)
    steps, began, step = start + len(loader), time.time(), start
    for step, batch in enumerate(progress_bar(loader, epoch, batch_size), start=start + 1):
        samples = batch.get("batch_size", len(batch["pids"]))  # of all processes
        if not samples:  # all its images were left out
            continue
        parts = [
            {key: on_device(value, device) for key, value in {**part, **unwrapped(model).plan(part)}.items()}
            for part in cut(batch, micro_batch)
        ]
        optimizer.zero_grad(set_to_none=True)
        if micro_batch:
            report = backward_in_parts(unwrapped(model), parts)
            loss = total_loss(report)
        else:
            report = model(parts[0])
            loss = total_loss(report)
            loss.backward()
        watch.before_step(step, loss, report, batch)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        logged = step % log_period == 0
        before = sampled_weights(unwrapped(model)) if logged else None
        optimizer.step()

        meters.update({"loss": loss, **report}, samples)
        if logged:
            meters.latest["frac_unmoved"] = float(frac_unmoved(unwrapped(model), before))
            lr = optimizer.param_groups[0]["lr"]
            logger.info(f"Epoch[{epoch}] Iteration[{step}/{steps}], {meters.shown()}, Base Lr: {lr:.2e}")
        if after_step:
            after_step(step, meters)
    watch.look()
    speed = ""
    if step > start:  # else it was stopped after its last batch, and this is the rest of it
        seconds = (time.time() - began) / (step - start)
        images = (batch_size or len(batch["pids"])) / seconds
        speed = f" Time per batch: {seconds:.3f}[s] Speed: {images:.1f}[samples/s]"
    logger.info(f"Epoch {epoch} done.{speed}")
    return {**meters.averages(), **meters.latest}


def total_loss(report):
    """The sum of every entry that is called a loss: a new one needs no edit here."""
    return sum(value for name, value in report.items() if "loss" in name)


def cut(batch, size):
    """The batch in parts of `size` samples, or whole. An empty one, a process's share, is one part."""
    B = max(len(batch["pids"]), 1)
    rows = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return [
        {key: value[start : start + (size or B)] for key, value in rows.items()}
        for start in range(0, B, size or B)
    ]


def on_device(value, device):
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def progress_bar(loader, epoch, batch_size):
    """On a terminal: images a second and the time that remains in this epoch."""
    from tqdm import tqdm

    hidden = None if rank() == 0 else True  # None: where there is no terminal
    return tqdm(
        loader, desc=f"epoch {epoch}", unit="img", unit_scale=batch_size or 1, leave=False, disable=hidden
    )


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
            known = [name for name in ORDER if name in report]
            self.names = known + [name for name in report if name not in ORDER]
        values = torch.stack([report[name].detach().double() for name in self.names])
        weights = torch.tensor([1.0 if name == "mlm_acc" else batch_size for name in self.names]).double()
        weighted = values * weights.to(values.device, non_blocking=True)
        self.sums = weighted if self.sums is None else self.sums.to(values.device) + weighted
        self.weights = weights if self.weights is None else self.weights + weights

    def averages(self):
        """{name: average}; on an accelerator this waits for it."""
        if not self.names:
            return {}
        return dict(zip(self.names, (self.sums.cpu() / self.weights).tolist(), strict=True))

    def shown(self):
        """As the published log shows them: averages of 0 are left out."""
        averages = {name: value for name, value in self.averages().items() if name != "temperature"}
        return ", ".join(f"{name}: {value:.4f}" for name, value in averages.items() if value > 0)

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
            f"--max_grad_norm 1 "
            "or a lower --lr (fp16 also needs Adam's eps of 1e-3)"
        )


def whole_batch(batch):
    """What tells the samples of a batch, as lists; of all processes' shares in order."""
    keys = [key for key in ("pids", "image_ids", "caption_ids") if key in batch]
    shares = from_all({key: batch[key].tolist() for key in keys})
    return {key: [row for share in shares for row in share[key]] for key in keys}


class FiniteWatch:
    """Keeps steps with a loss or gradient that is not finite from being taken.

    The optimiser is told through `found_inf`, as torch.amp's GradScaler tells it: a fused one skips the step
    on the device, so that the host need not wait. Every `period` steps the host looks whether that happened.
    """

    def __init__(self, model, optimizer, epoch, period):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.epoch = optimizer, epoch
        self.fused = bool(optimizer.defaults.get("fused"))  # others refuse found_inf: then the host looks
        self.period = period if self.fused else 1
        self.first, self.recent = None, []

    def before_step(self, step, loss, report, batch):
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # the largest magnitude, not the 2-norm, which overflows in fp16 where no gradient does
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        finite = torch.isfinite(loss.detach()) & torch.isfinite(largest)
        if self.fused:
            self.optimizer.found_inf = (~finite).float()
        failed = torch.where(finite, torch.inf, float(step))
        self.first = failed if self.first is None else torch.minimum(self.first, failed)
        losses = {name: value.detach() for name, value in report.items() if "loss" in name}
        self.recent.append((step, losses, batch))
        if step % self.period == 0:
            self.look()

    def look(self):
        first = float("inf") if self.first is None else float(self.first)
        for step, losses, batch in self.recent:
            if step == first:
                raise NotFinite(
                    {
                        "epoch": self.epoch,
                        "iteration": step,
                        "losses": {name: float(value) for name, value in losses.items()},
                        **whole_batch(batch),
                    }
                )
        self.first, self.recent = None, []
