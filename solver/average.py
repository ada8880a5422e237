"""An exponential moving average of the weights, kept beside them."""

from contextlib import contextmanager

import torch

from solver.skip import move_towards_unless


class WeightAverage:
    """average ← decay · average + (1 − decay) · weight after each step, in fp32 whatever the weight's type,
    on its device; the host never waits for it. Running statistics of a ResNet are averaged as weights are.

    Not torch.optim.swa_utils.AveragedModel: it averages in the weight's own type, in which (1 − decay) of a
    small difference is lost in fp16, reads its count of steps on the host, and knows no step left out.
    """

    def __init__(self, model, decay):
        self.decay = decay
        # they share memory with the model's, which a loading or a step writes into
        self.weights = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
        self.begin()

    def begin(self):
        """Forget the steps so far: the average of no step is the weights as they are now."""
        self.averages = {name: t.to(torch.float32, copy=True) for name, t in self.weights.items()}

    def update(self, left_out=None):
        """Count the step just taken. left_out: of FiniteWatch, 1 on the device where it changed nothing."""
        weights = in_fp32(list(self.weights.values()))
        move_towards_unless(left_out, list(self.averages.values()), weights, 1 - self.decay)

    @contextmanager
    def in_place(self):
        """While it lasts the model's weights are the averages, each rounded to the weight's type."""
        weights = list(self.weights.values())
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, list(self.averages.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def state_dict(self):
        return dict(self.averages)

    def load_state_dict(self, state):
        for name, average in self.averages.items():
            average.copy_(state[name])


def in_fp32(weights):
    """The tensors themselves, or a copy for the time of a step of those in half precision."""
    halves = [weight for weight in weights if weight.dtype != torch.float32]
    copies = [torch.empty_like(weight, dtype=torch.float32) for weight in halves]
    if halves:
        torch._foreach_copy_(copies, halves)
    copies = iter(copies)
    return [weight if weight.dtype == torch.float32 else next(copies) for weight in weights]
