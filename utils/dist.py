"""What the processes of a run exchange.

One process that was started alone is a group of one, and every function here then does nothing.
"""

import torch
import torch.distributed as dist


def process_index():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def number_of_gpus(device):
    return world_size() if device.type == "cuda" else 0


class _Gather(torch.autograd.Function):
    """Forward: the rows of all processes, in their order. Backward: the sum over processes of the gradients
    that each computed for the rows of this one."""

    @staticmethod
    def forward(ctx, rows, sizes):
        ctx.start, ctx.size = sum(sizes[: process_index()]), len(rows)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # another branch may hold it too
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.size], None


class _ProcessSum(torch.autograd.Function):
    """Forward: the sum over processes. Backward: likewise, since each of them went on with that sum."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def share_sizes(number, device):
    """How many rows each process has, in the processes' order. On an accelerator the host waits for that."""
    if world_size() == 1:
        return [number]
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.full((1,), number, device=device))
    return torch.cat(sizes).tolist()


def gather(rows, sizes=None):
    """Rows of all processes [ΣB, …], in the processes' order, with gradients; shares may differ in size.

    sizes: what share_sizes gave, where several things of the same rows are gathered.

    A loss of gathered rows is the same number in each process, and DistributedDataParallel, which averages
    over processes, then gives the parameters the gradient that one process with the whole batch would give.
    """
    if world_size() == 1:
        return rows
    return _Gather.apply(rows, sizes or share_sizes(len(rows), rows.device))


def process_sum(x):
    """Sum over processes, with gradients; see `gather`."""
    return x if world_size() == 1 else _ProcessSum.apply(x)


def share(size, parts=None, part=None):
    """The slice of `size` things that is this process's: contiguous, nothing twice, nothing left out."""
    parts, part = parts or world_size(), process_index() if part is None else part
    return slice(size * part // parts, size * (part + 1) // parts)


def from_main(value):
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(value):
    """[the value of each process, in the processes' order], in every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag, device):
    """Whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    box = torch.tensor(float(flag), device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return bool(box)


def replicate(model, device, in_parts=False):
    """The model as the processes train it together. Its state dict is that of `unwrapped(model)`.

    in_parts: it is trained in micro-batches, whose gradients `average_gradients` brings together.
    """
    if not dist.is_initialized():
        return model
    if in_parts:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        return model
    if device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def average_gradients(model):
    """What DistributedDataParallel does at the end of a backward pass, for a model without it."""
    if world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= world_size()  # first, as there: a sum in fp16 may be above 65504
            dist.all_reduce(parameter.grad)


def unwrapped(model):
    return getattr(model, "module", model)
