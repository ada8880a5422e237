"""Train IRRA. `python train.py --help` lists the options; README.md tells the story."""

import sys
from pathlib import Path

from utils.data_sets import name_of
from utils.errors import InputError, reports_errors
from utils.options import STOPPED, get_args, read_run_options


@reports_errors
def main(argv=None):
    args = get_args(argv)  # before PyTorch is loaded: --help and a mistyped option answer at once
    if not args.training:
        raise InputError("--test: evaluating a run is the work of test.py --config_file RUN/configs.yaml")
    from utils.dist import pick_device, process_group, recall

    argv = sys.argv[1:] if argv is None else argv
    checkpoint = checkpoint_to_resume(args)
    if checkpoint:
        args = options_to_resume(args, checkpoint, argv)
    device = pick_device(args.device)
    with process_group(device):
        begun = recall("run")
        if begun:  # torchrun has started the processes anew, after one that ended badly
            checkpoint = Path(begun) / "last.pth"
            args = options_to_resume(get_args(argv), checkpoint, argv)
        return train(args, device, checkpoint)


def checkpoint_to_resume(args):
    """What --resume goes on with: the file that --resume_ckpt_file names, or the last.pth of the newest run
    of this name. Else None."""
    if not args.resume:
        if args.resume_ckpt_file:
            raise InputError(
                f"--resume_ckpt_file {args.resume_ckpt_file} goes with --resume: without it a new training "
                "would begin"
            )
        return None
    if args.resume_ckpt_file:
        path = Path(args.resume_ckpt_file)
        return path / "last.pth" if path.is_dir() else path
    folder = Path(args.output_dir) / name_of(args)
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
                args.notes.append(f"{key} was {value} before and is {getattr(args, key)} from here on")
    return args


def train(args, device, checkpoint=None):
    import torch

    from datasets import build_dataloader
    from model import build_model
    from processor.trainer import NotFinite
    from solver import build_lr_scheduler, build_optimizer
    from utils.checkpoint import load_checkpoint
    from utils.dist import number_of_gpus, out_of_memory
    from utils.precision import check_precision
    from utils.run import RunFiles, Stopped, StopSignals, leave_signals_to_parent, setup_logger

    goes_on = checkpoint and (checkpoint.parent / "configs.yaml").is_file()  # else it is a run of its own
    run = RunFiles(args, checkpoint.parent if goes_on else None)
    logger = setup_logger("IRRA")
    log = logger.getChild("train")
    precision = check_precision(args, device)  # before anything is loaded
    logger.info(f"Using {number_of_gpus(device)} GPUs")
    logger.info(precision)
    logger.info(run.described(args))
    for note in args.notes:
        logger.info(note)
    state = load_checkpoint(checkpoint) if checkpoint else None  # a bad one is found before data and model
    # for the new layers' weights; order, augmentation and masks have streams of their own
    torch.manual_seed(args.seed)

    *loaders, num_classes = build_dataloader(args)
    for loader in loaders:
        loader.worker_init_fn = leave_signals_to_parent
    model = build_model(args, num_classes)
    logger.info(f"Total params: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M")
    optimizer = build_optimizer(args, model)
    parts = {"model": model, "optimizer": optimizer, "scheduler": build_lr_scheduler(args, optimizer)}
    done = {"epoch": 0, "iteration": 0, "samples": 0, "to_evaluate": False}
    done.update({"best_R1": -1.0, "best_epoch": 0, "meters": {}, "seed": args.seed})
    if checkpoint:
        done.update(restore(parts, state, checkpoint))
        del state
        best = f"best R1: {done['best_R1']} at epoch {done['best_epoch']}"
        if done["epoch"] >= args.num_epoch and not done["to_evaluate"]:
            log.info(f"{checkpoint} has all {args.num_epoch} epochs: nothing is left to do ({best})")
            return
        log.info(
            f"resumed from {checkpoint}: {done['epoch']} epochs and {done['iteration']} iterations are done"
        )
        check_rest_of_epoch(args, done)
    run.open(args, logger, first_epoch=done["epoch"] + 1)
    try:
        with StopSignals(log) as stop, out_of_memory(device, args.batch_size):
            if not checkpoint:
                run.save(
                    "last.pth", parts, **done
                )  # from here on there is something to resume, and room for it
            log.info("start training")
            fit(args, device, loaders, parts, done, run, stop)
    except Stopped as reason:
        log.info(f"{reason}; all is saved, and --resume --resume_ckpt_file {run.folder} goes on from there")
        return STOPPED
    except NotFinite as error:
        raise InputError(f"{error}. The batch is described in {run.keep_evidence(error.evidence)}") from None
    finally:
        run.close()
        loaders[0].close()
        for loader in loaders[:2]:
            for reason in loader.left_out.values():
                log.warning(f"was left out: {reason}")
    if done["best_epoch"]:
        log.info(f"best R1: {done['best_R1']} at epoch {done['best_epoch']}")


def check_rest_of_epoch(args, done):
    """An epoch that was stopped goes on with the samples that are left, whatever the batch size is now."""
    # earlier checkpoints count batches only
    done["samples"] = done["samples"] or done["iteration"] * args.batch_size
    if args.sampler == "identity" and done["samples"] != done["iteration"] * args.batch_size:
        raise InputError(
            f"--batch_size {args.batch_size} is not the one that this epoch began with, and the identity "
            "sampler's order depends on it: end the epoch with the earlier one first"
        )
    done["iteration"] = done["samples"] // args.batch_size


def fit(args, device, loaders, parts, done, run, stop):
    """The epochs that are not done yet: train, evaluate, keep the best and the last."""
    from processor.trainer import FiniteWatch, Meters, look_period, train_one_epoch
    from utils.dist import any_process, replicate, world_size
    from utils.run import Stopped

    train_loader, img_loader, txt_loader = loaders
    model = replicate(parts["model"], device, args.micro_batch)

    def after_step(step, meters):
        if stop.again:  # a callback of Python's own, such as those of a fork, has swallowed the interrupt
            raise KeyboardInterrupt
        # several processes with accelerators ask one another now and then only: that makes them wait
        asks = world_size() == 1 or device.type == "cpu" or step % 10 == 0
        stopped = asks and any_process(stop.asked, device)
        if stopped or (args.save_period and step % args.save_period == 0):
            watch.look()  # what a bad step was left out of is not saved as if it had been taken
            samples = done["samples"] + (step - done["iteration"]) * args.batch_size
            progress = {"iteration": step, "samples": samples, "meters": meters.state_dict()}
            run.save("last.pth", parts, **{**done, **progress})
        if stopped:
            raise Stopped(f"stopped in epoch {done['epoch'] + 1} after iteration {step}")

    def evaluate_if_due():
        """What may fail comes after the saving; a run that was ended in it evaluates when it goes on."""
        epoch = done["epoch"]
        if done["to_evaluate"]:
            R1 = evaluate_epoch(parts["model"], img_loader, txt_loader, device, run, epoch)
            if R1 > done["best_R1"]:
                done.update(best_R1=R1, best_epoch=epoch)
                run.log.info(f"Saving checkpoint to {run.folder / 'best.pth'}")
                run.save("best.pth", parts, iteration=0, epoch=epoch)
            done.update(to_evaluate=False)
            run.save("last.pth", parts, **done)
            run.keep_numbered(epoch, args.keep)

    evaluate_if_due()  # of the epoch that an interrupted run has trained
    for epoch in range(done["epoch"] + 1, args.num_epoch + 1):
        start, meters = done["iteration"], Meters.from_state(done["meters"])
        train_loader.set_epoch(epoch, samples=done["samples"])
        watch = FiniteWatch(model, parts["optimizer"], epoch, look_period(device, args.log_period))
        averages = train_one_epoch(
            model,
            train_loader,
            parts["optimizer"],
            device,
            epoch,
            log_period=args.log_period,
            batch_size=args.batch_size,
            start=start,
            meters=meters,
            max_grad_norm=args.max_grad_norm,
            after_step=after_step,
            micro_batch=args.micro_batch,
            watch=watch,
        )
        shown = {name: value for name, value in averages.items() if value > 0}  # no zeros, as published
        run.board(epoch, lr=parts["scheduler"].get_last_lr()[0], **shown)
        parts["scheduler"].step()
        # a run shorter than its evaluation period is evaluated at its end
        due = epoch % args.eval_period == 0 or epoch == args.num_epoch < args.eval_period
        done.update(epoch=epoch, iteration=0, samples=0, meters={}, to_evaluate=due)
        run.save("last.pth", parts, **done)
        run.keep_numbered(epoch, args.keep)
        evaluate_if_due()
        if epoch < args.num_epoch and any_process(stop.asked, device):
            raise Stopped(f"stopped after epoch {epoch}")


def evaluate_epoch(model, img_loader, txt_loader, device, run, epoch):
    """Table, TensorBoard's figures and its picture; returns text-to-image R1. A function of its own, so that
    no feature stays on the device while the training goes on."""
    from processor.evaluator import encode, evaluate, log_table
    from retrieval.contact_sheet import gallery_paths, retrieval_picture
    from utils.dist import from_all

    run.log.info(f"Validation Results - Epoch: {epoch}")
    features = encode(model, img_loader, txt_loader, device)
    rows, ranking = evaluate(features, i2t=True)
    log_table({"t2i": rows["t2i"]})
    for task, figures in rows.items():
        run.board(epoch, **{f"{task}/{name}": value for name, value in figures.items()})
    paths = gallery_paths(img_loader.dataset, from_all(img_loader.left_out))
    run.picture(epoch, retrieval_picture(features, ranking.indices, paths, txt_loader.dataset.captions))
    return rows["t2i"]["R1"]


def restore(parts, state, source):
    """Put a checkpoint's parts back; returns what it says of the progress. Of a published one the weights
    fit, but not the optimiser."""
    from utils.checkpoint import fit_groups, load_optimizer, load_weights

    model, optimizer = parts["model"], parts["optimizer"]
    saved = fit_groups(optimizer, state.get("optimizer"), model, state["model"], source)
    load_weights(model, state["model"], source)
    load_optimizer(optimizer, saved, source)
    kinds = {"epoch": int, "iteration": int, "samples": int, "to_evaluate": bool}
    kinds.update({"best_R1": float, "best_epoch": int, "meters": dict})
    kept = {key: state[key] for key in kinds if key in state}
    try:
        parts["scheduler"].load_state_dict(state["scheduler"])
        wrong = next((key for key, value in kept.items() if not isinstance(value, kinds[key])), None)
    except (KeyError, TypeError) as error:
        wrong = f"scheduler ({error!r})"
    if wrong or "epoch" not in kept:
        raise InputError(f"{source} cannot be resumed: its part {wrong or 'epoch'} is missing or damaged")
    return kept


if __name__ == "__main__":
    raise SystemExit(main())
