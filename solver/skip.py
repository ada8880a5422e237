"""Leaving a step out on the device, for optimisers that are not fused.

In fp16 the published recipe needs Adam as a chain of operations, each of which rounds (`foreach`); but only
the fused kernels know `found_inf`, by which the device itself leaves a step out, so that the host need not
wait for it. Here the chain takes its step, with what it changes kept beside it, and a bad step is put back.
"""

import torch


def skips_by_itself(optimizer):
    """Whether its own kernels heed `found_inf`: PyTorch's word, by which its GradScaler goes too."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def skips_on_device(optimizer):
    """Make the optimiser heed `optimizer.found_inf`, as a fused one does: a float tensor of one element on
    the device, 1 where the next step must change nothing. It costs a copy of weights and moments while the
    step lasts, when activations are gone. The host's count of steps (Adam's bias correction) goes on.
    """
    kept = []

    def before(optimizer, args, kwargs):
        flag, optimizer.found_inf = optimizer.found_inf, None  # the chain itself refuses it
        if flag is not None:
            tensors = dict(_tensors(optimizer))
            copies = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
            for targets, sources in by_type(copies.values(), tensors.values()):
                torch._foreach_copy_(targets, sources)
            kept.append((flag, copies))

    def after(optimizer, args, kwargs):
        if kept:
            flag, copies = kept.pop()
            now = dict(_tensors(optimizer))
            # a moment that came into being in this step was 0
            earlier = [copies[p] if p in copies else torch.zeros_like(t) for p, t in now.items()]
            copy_unless(1 - flag, list(now.values()), earlier)

    optimizer.found_inf = None
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


@torch.no_grad()
def _tensors(optimizer):
    """((parameter, name), tensor) of what a step changes on the device: weights and moments."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            yield (parameter, "weight"), parameter.detach()
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and name != "step":
                    yield (parameter, name), value


def copy_unless(flag, targets, sources):
    """target ← source, tensor by tensor, bit for bit; nothing where flag (float, one element) is 1.

    What the device alone decides about, without reading the rest, are the fused optimisers. SGD's first step
    with momentum stores the gradient as the momentum, as it is, and at a rate of 0 does nothing else.
    """
    for into, values in by_type(targets, sources):
        # the parameters of this step, `values` too, change by 0 times the momentum
        sgd_step(values, values, into, flag, momentum=1.0)


def move_towards_unless(flag, targets, sources, weight):
    """target ← target + weight · (source − target), all in fp32, to the bit the same with and without a flag;
    nothing where flag (float, one element) is 1.

    It is a step of SGD: from the gradient −source + 1 · target, at the rate `weight`.
    """
    for into, values in by_type(targets, sources):
        sgd_step(into, values, [], flag, weight_decay=1.0, lr=weight, maximize=True)


def sgd_step(parameters, gradients, momenta, flag, **how):
    """PyTorch's fused first step of SGD on tensors of one type, of rate 0 and so on but for `how`; nothing
    where flag is 1."""
    none = dict(weight_decay=0.0, momentum=0.0, lr=0.0, dampening=0.0, nesterov=False, maximize=False)
    torch._fused_sgd_(parameters, gradients, momenta, **{**none, **how}, is_first_step=True, found_inf=flag)


def by_type(targets, sources):
    """The pairs as (targets, sources) of one type and device each: only then one kernel serves many."""
    lists = {}
    for target, source in zip(targets, sources, strict=True):
        pair = lists.setdefault((target.device, target.dtype), ([], []))
        pair[0].append(target)
        pair[1].append(source)
    return lists.values()
