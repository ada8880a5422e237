"""Train IRRA. `python train.py --help` lists the options; README.md tells the story."""

from pathlib import Path

from utils.errors import InputError, reports_errors
from utils.options import get_args, read_run_options


@reports_errors
def main(argv=None):
    args = get_args(argv)  # before PyTorch is loaded: --help and a mistyped option answer at once
    if not args.training:
        raise InputError("--test: evaluating a run is the work of test.py --config_file RUN/configs.yaml")
    checkpoint = None
    if args.resume:
        args, checkpoint = resumed(args, argv)
    train(args, checkpoint)


def resumed(args, argv):
    """The options of the run that --resume goes on with, the command line over them; and its checkpoint."""
    import sys

    checkpoint = checkpoint_to_resume(args)
    configs = checkpoint.parent / "configs.yaml"
    if not configs.is_file():
        return args, checkpoint
    if not args.config_file:
        args = get_args(["--config_file", str(configs), *(sys.argv[1:] if argv is None else argv)])
    saved = read_run_options(configs)
    for key, value in vars(saved).items():
        if key not in (
            "resume",
            "resume_ckpt_file",
            "output_dir",
            "config_file",
            "notes",
        ) and value != getattr(args, key):
            args.notes.append(
                f"{key} was {value} in the run that is resumed, and is {getattr(args, key)} from here on"
            )
    args.run_dir = str(checkpoint.parent)
    return args, checkpoint


def checkpoint_to_resume(args):
    if args.resume_ckpt_file:
        path = Path(args.resume_ckpt_file)
        return path / "last.pth" if path.is_dir() else path
    folder = Path(args.output_dir) / args.dataset_name
    found = sorted(folder.glob(f"[0-9]*_[0-9]*_{args.name}/last.pth"))
    found = [path for path in found if path.parent.name[16:] == args.name]
    if not found:
        raise InputError(
            f"nothing to resume: no run named {args.name} with a last.pth in {folder} "
            f"(see --resume_ckpt_file)"
        )
    return found[-1]


def train(args, checkpoint=None):
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from datasets import build_dataloader
    from model import build_model
    from processor.evaluator import encode, evaluate, table
    from processor.trainer import train_one_epoch
    from solver import build_lr_scheduler, build_optimizer
    from utils.checkpoint import load_checkpoint, save_checkpoint
    from utils.dist import pick_device
    from utils.run import keep_log, make_folder, new_run_folder, save_configs, setup_logger

    device = pick_device(args.device)
    resumed_run = getattr(args, "run_dir", None)
    folder = Path(resumed_run or new_run_folder(args))
    args.output_dir = str(folder)
    logger = setup_logger("IRRA")
    logger.info(f"Using {1 if device.type == 'cuda' else 0} GPUs")
    notes = args.notes
    logger.info(str({key: value for key, value in vars(args).items() if key != "notes"}))
    for note in notes:
        logger.info(note)
    torch.manual_seed(
        args.seed
    )  # the new layers' weights; order, augmentation and masks have streams of their own

    train_loader, img_loader, txt_loader, num_classes = build_dataloader(args)
    model = build_model(args, num_classes)
    logger.info(f"Total params: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M")
    optimizer = build_optimizer(args, model)
    scheduler = build_lr_scheduler(args, optimizer)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    first, best_R1, best_epoch = 1, -1.0, 0
    if checkpoint:
        state = load_checkpoint(checkpoint)
        restore(parts, state, checkpoint)
        first, best_R1, best_epoch = (
            state["epoch"] + 1,
            state.get("best_R1", -1.0),
            state.get("best_epoch", 0),
        )
        logger.info(f"resumed from {checkpoint}: epoch {first} comes next, best R1 so far {best_R1:.3f}")
    if not resumed_run:
        make_folder(folder)
    keep_log(logger, folder / "train_log.txt")
    save_configs(args, folder)
    board = SummaryWriter(folder, purge_step=first if checkpoint else None)

    train_logger = logger.getChild("train")
    train_logger.info("start training")
    for epoch in range(first, args.num_epoch + 1):
        train_loader.set_epoch(epoch)
        averages = train_one_epoch(
            model, train_loader, optimizer, device, epoch, args.log_period, args.batch_size
        )
        board.add_scalar("lr", scheduler.get_last_lr()[0], epoch)
        for name, value in averages.items():
            if value > 0:  # as published: an accuracy of 0 leaves no point
                board.add_scalar(name, value, epoch)
        scheduler.step()

        progress = {"num_epoch": args.num_epoch, "iteration": 0, "epoch": epoch}
        if epoch % args.eval_period == 0:
            train_logger.info(f"Validation Results - Epoch: {epoch}")
            rows, _ = evaluate(encode(model, img_loader, txt_loader, device))
            logger.getChild("eval").info(f"\n{table(rows)}")
            for name, value in rows["t2i"].items():
                board.add_scalar(f"t2i/{name}", value, epoch)
            if rows["t2i"]["R1"] > best_R1:
                best_R1, best_epoch = rows["t2i"]["R1"], epoch
                train_logger.info(f"Saving checkpoint to {folder / 'best.pth'}")
                save_checkpoint(folder / "best.pth", parts, **progress)
        save_checkpoint(
            folder / "last.pth", parts, **progress, best_R1=best_R1, best_epoch=best_epoch, seed=args.seed
        )
        board.flush()
    board.close()
    train_logger.info(f"best R1: {best_R1} at epoch {best_epoch}")


def restore(parts, state, source):
    """Put a checkpoint's parts back. Of a published one the weights fit, but not the optimiser."""
    from utils.checkpoint import load_weights

    groups = [len(group["params"]) for group in state.get("optimizer", {}).get("param_groups", [])]
    own = [len(group["params"]) for group in parts["optimizer"].param_groups]
    if groups != own:
        raise InputError(
            f"{source} cannot be resumed: its optimiser has {len(groups)} parameter groups, ours {len(own)} "
            "(the published code makes one of each parameter; such a file is for test.py)"
        )
    load_weights(parts["model"], state["model"], source)
    parts["optimizer"].load_state_dict(state["optimizer"])
    parts["scheduler"].load_state_dict(state["scheduler"])


if __name__ == "__main__":
    raise SystemExit(main())
