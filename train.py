"""Train IRRA. `python train.py --help` lists the options; README.md tells the story."""

import sys
from pathlib import Path

from utils.errors import InputError, reports_errors
from utils.options import STOPPED, get_args, read_run_options


@reports_errors
def main(argv=None):
    args = get_args(argv)  # before PyTorch is loaded: --help and a mistyped option answer at once
    if not args.training:
        raise InputError("--test: evaluating a run is the work of test.py --config_file RUN/configs.yaml")
    checkpoint = None
    if args.resume:
        checkpoint = checkpoint_to_resume(args)
        args = options_to_resume(args, checkpoint, sys.argv[1:] if argv is None else argv)
    return train(args, checkpoint)


def checkpoint_to_resume(args):
    """The file that --resume_ckpt_file names, or the last.pth of the newest run of this name."""
    if args.resume_ckpt_file:
        path = Path(args.resume_ckpt_file)
        return path / "last.pth" if path.is_dir() else path
    folder = Path(args.output_dir) / args.dataset_name
    runs = [path for path in sorted(folder.glob("*/last.pth")) if path.parent.name[16:] == args.name]
    if not runs:
        raise InputError(
            f"nothing to resume: no run named {args.name} with a last.pth in {folder} (see "
            f"--resume_ckpt_file)"
        )
    return runs[-1]


def options_to_resume(args, checkpoint, argv):
    """The options of the run that is resumed, the command line over them; what then differs is noted."""
    configs = checkpoint.parent / "configs.yaml"
    if not configs.is_file():
        return args
    saved = read_run_options(configs)
    if not args.config_file:
        args = get_args(["--config_file", str(configs), *argv])
    for key, value in vars(saved).items():
        if key not in ("resume", "resume_ckpt_file", "output_dir", "config_file", "notes", "debug"):
            if getattr(args, key) != value:
                args.notes.append(
                    f"{key} was {value} when this run was stopped and is {getattr(args, key)} now"
                )
    args.run_dir = str(checkpoint.parent)
    return args


def train(args, checkpoint=None):
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from datasets import build_dataloader
    from model import build_model
    from processor.evaluator import encode, evaluate, table
    from processor.trainer import Meters, NotFinite, train_one_epoch
    from solver import build_lr_scheduler, build_optimizer
    from utils.checkpoint import load_checkpoint, save_checkpoint
    from utils.dist import number_of_gpus, out_of_memory, pick_device
    from utils.run import RunFiles, Stopped, StopSignals, leave_signals_to_parent, setup_logger

    device = pick_device(args.device)
    run = RunFiles(args)
    logger = setup_logger("IRRA")
    log = logger.getChild("train")
    logger.info(f"Using {number_of_gpus(device)} GPUs")
    logger.info(run.described(args))
    for note in args.notes:
        logger.info(note)
    state = load_checkpoint(checkpoint) if checkpoint else None  # a bad one is found before data and model
    # for the new layers' weights; order, augmentation and masks have streams of their own
    torch.manual_seed(args.seed)

    train_loader, img_loader, txt_loader, num_classes = build_dataloader(args)
    for loader in (train_loader, img_loader):
        loader.worker_init_fn = leave_signals_to_parent
    model = build_model(args, num_classes)
    logger.info(f"Total params: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M")
    optimizer = build_optimizer(args, model)
    scheduler = build_lr_scheduler(args, optimizer)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    done = {"epoch": 0, "iteration": 0, "best_R1": -1.0, "best_epoch": 0, "meters": {}, "seed": args.seed}
    if checkpoint:
        done.update(restore(parts, state, checkpoint))
        del state
        if done["epoch"] >= args.num_epoch:
            log.info(
                f"{checkpoint} has all {args.num_epoch} epochs: nothing is left to do (best R1: "
                f"{done['best_R1']} at epoch {done['best_epoch']})"
            )
            return
        log.info(
            f"resumed from {checkpoint}: {done['epoch']} epochs and {done['iteration']} iterations are done"
        )
    run.open(args, logger)
    board = SummaryWriter(run.folder, purge_step=done["epoch"] + 1 if checkpoint else None)

    def save(name, **more):
        save_checkpoint(run.folder / name, parts, num_epoch=args.num_epoch, **more)

    def after_step(step, meters):
        if stop.asked or (args.save_period and step % args.save_period == 0):
            save("last.pth", **{**done, "iteration": step, "meters": meters.state_dict()})
        if stop.asked:
            raise Stopped(f"stopped in epoch {done['epoch'] + 1} after iteration {step}")

    with StopSignals(log) as stop, out_of_memory(device, args.batch_size):
        try:
            if not checkpoint:
                save("last.pth", **done)  # from here on there is something to resume, and room on the disk
            log.info("start training")
            for epoch in range(done["epoch"] + 1, args.num_epoch + 1):
                start, meters = done["iteration"], Meters.from_state(done["meters"])
                train_loader.set_epoch(epoch, start)
                averages = train_one_epoch(
                    model,
                    train_loader,
                    optimizer,
                    device,
                    epoch,
                    args.log_period,
                    args.batch_size,
                    start,
                    meters,
                    args.max_grad_norm,
                    after_step,
                )
                board.add_scalar("lr", scheduler.get_last_lr()[0], epoch)
                for name, value in averages.items():
                    if value > 0:  # as published: an accuracy of 0 leaves no point
                        board.add_scalar(name, value, epoch)
                scheduler.step()
                done.update(epoch=epoch, iteration=0, meters={})

                if epoch % args.eval_period == 0:
                    log.info(f"Validation Results - Epoch: {epoch}")
                    rows, _ = evaluate(encode(model, img_loader, txt_loader, device))
                    logger.getChild("eval").info(f"\n{table(rows)}")
                    for name, value in rows["t2i"].items():
                        board.add_scalar(f"t2i/{name}", value, epoch)
                    if rows["t2i"]["R1"] > done["best_R1"]:
                        done.update(best_R1=rows["t2i"]["R1"], best_epoch=epoch)
                        log.info(f"Saving checkpoint to {run.folder / 'best.pth'}")
                        save("best.pth", iteration=0, epoch=epoch)
                save("last.pth", **done)
                run.keep_numbered(epoch, args.keep)
                board.flush()
                if stop.asked and epoch < args.num_epoch:
                    raise Stopped(f"stopped after epoch {epoch}")
        except Stopped as reason:
            log.info(
                f"{reason}; all is saved, and --resume --resume_ckpt_file {run.folder} goes on from there"
            )
            return STOPPED
        except NotFinite as error:
            raise InputError(
                f"{error}. The batch is described in {run.keep_evidence(error.evidence)}"
            ) from None
        finally:
            board.close()
    log.info(f"best R1: {done['best_R1']} at epoch {done['best_epoch']}")


def restore(parts, state, source):
    """Put a checkpoint's parts back; returns what it says of the progress. Of a published one the weights
    fit, but not the optimiser."""
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
    return {
        key: state[key] for key in ("epoch", "iteration", "best_R1", "best_epoch", "meters") if key in state
    }


if __name__ == "__main__":
    raise SystemExit(main())
