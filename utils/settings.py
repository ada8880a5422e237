"""In which precision a run computes, and which optimisers can train in it."""

from utils.errors import InputError

EPS = {  # of each optimiser that has one
    "Adam": 1e-3,  # part of the recipe: in fp16 most second moments round to 0, which leaves momentum SGD
    "AdamW": 1e-8,
}
SMALLEST_EPS = 1e-4  # in fp16 a smaller one rounds coarsely, under 3e-8 to 0: then a step divides by 0


def pick_precision(args, device):
    """fp16, bf16 or fp32: what --precision names, or by itself fp32 on a CPU and on an accelerator fp16, as
    published, unless the run cannot train in it. The same rule for training and for testing the run."""
    return args.precision or ("fp32" if device.type == "cpu" or why_not_fp16(args) else "fp16")


def why_not_fp16(args):
    """What keeps this run from training in fp16 as published, without loss scaling; None if nothing does."""
    eps = EPS.get(args.optimizer, 1.0)
    if eps < SMALLEST_EPS:
        return f"{args.optimizer}'s eps of {eps:g} rounds to 0 in fp16, and weights to NaN in the second step"
    if args.pretrain_choice == "random":
        return "fp16 without loss scaling is for fine-tuning, and these weights start at random"
    return None


def check_precision(args, device):
    """What to log about the precision of a training. Raises InputError where it cannot train."""
    precision, reason = pick_precision(args, device), why_not_fp16(args)
    if precision == "fp16" and EPS.get(args.optimizer, 1.0) < SMALLEST_EPS:
        raise InputError(
            f"--precision fp16 with --optimizer {args.optimizer}: {reason}; use --precision bf16 or fp32, or "
            "Adam"
        )
    if precision == "fp16" and reason:
        return f"Precision: fp16, as asked for; but {reason}: --precision bf16 or fp32 is safer"
    if args.precision or device.type == "cpu" or not reason:
        return f"Precision: {precision}"
    return f"Precision: {precision}, since {reason}; --precision bf16 is quicker where the GPU has it"
