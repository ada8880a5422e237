"""One epoch of training, and what guards it."""

import logging
import time

import torch

from utils.errors import InputError

logger = logging.getLogger("IRRA.train")
ORDER = ("loss", "sdm_loss", "itc_loss", "cmpm_loss", "id_loss", "mlm_loss", "img_acc", "txt_acc", "mlm_acc")


class Meters:
    """Averages over an epoch of whatever the model reports; the sums stay on the device until they are read.

    Weighted by batch size as published, but for mlm_acc, whose batches all weigh the same.
    """

    def __init__(self):
        self.names, self.sums, self.weights = None, 0.0, 0.0

    def update(self, report, batch_size):
        if self.names is None:
            known = [name for name in ORDER if name in report]
            self.names = known + [name for name in report if name not in ORDER]
        weights = [1 if name == "mlm_acc" else batch_size for name in self.names]
        values = torch.stack([report[name].detach().float() for name in self.names])
        self.weights = self.weights + torch.tensor(weights, dtype=torch.float64)
        self.sums = self.sums + values.double() * torch.tensor(weights, dtype=torch.float64).to(values.device)

    def averages(self):
        if self.names is None:
            return {}
        return dict(zip(self.names, (self.sums.cpu() / self.weights).tolist(), strict=True))


def train_one_epoch(model, loader, optimizer, device, epoch, log_period=100, batch_size=None):
    """One pass over the loader (batches as model.forward takes them). Returns the epoch's averages by name.

    Raises InputError when the loss stops being a number.
    """
    model.train()
    meters, start, steps = Meters(), time.time(), len(loader)
    for step, batch in enumerate(progress_bar(loader, epoch, batch_size), start=1):
        batch = {key: on_device(value, device) for key, value in {**batch, **model.plan(batch)}.items()}

        report = model(batch)
        loss = sum(value for name, value in report.items() if "loss" in name)
        if device.type == "cpu" or step % log_period == 0:  # elsewhere each look would make the device wait
            stop_unless_finite(loss, epoch, step, report)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        meters.update({"loss": loss, **report}, len(batch["pids"]))
        if step % log_period == 0:
            lr = optimizer.param_groups[0]["lr"]
            logger.info(
                f"Epoch[{epoch}] Iteration[{step}/{steps}], {shown(meters.averages())}, Base Lr: {lr:.2e}"
            )
    averages = meters.averages()
    if not all(value == value and abs(value) != float("inf") for value in averages.values()):
        stop_unless_finite(loss * float("nan"), epoch, step, report)
    seconds = (time.time() - start) / step
    speed = (batch_size or len(batch["pids"])) / seconds
    logger.info(f"Epoch {epoch} done. Time per batch: {seconds:.3f}[s] Speed: {speed:.1f}[samples/s]")
    return averages


def on_device(value, device):
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def progress_bar(loader, epoch, batch_size):
    """On a terminal: images a second and the time that remains in this epoch."""
    from tqdm import tqdm

    return tqdm(
        loader, desc=f"epoch {epoch}", unit="img", unit_scale=batch_size or 1, leave=False, disable=None
    )


def shown(averages):
    """Averages as the published log shows them: those that are 0 are left out."""
    return ", ".join(
        f"{name}: {value:.4f}" for name, value in averages.items() if name != "temperature" and value > 0
    )


def stop_unless_finite(loss, epoch, step, report):
    if torch.isfinite(loss):
        return
    parts = ", ".join(f"{name} {float(value):.4g}" for name, value in report.items() if "loss" in name)
    raise InputError(
        f"the loss is no longer a number in epoch {epoch}, by iteration {step} ({parts}); the checkpoints "
        "of earlier epochs are good. Try --precision bf16, a lower --lr, or Adam: fp16 needs its eps of 1e-3"
    )
