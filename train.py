"""Train IRRA. `python train.py --help` lists the options; README.md tells the story."""

import sys
from pathlib import Path

from utils.errors import InputError, reports_errors
from utils.options import STOPPED, get_args, read_run_options
from utils.run_folders import newest_run


@reports_errors
def main(argv=None):
    args = get_args(argv)  # before PyTorch is loaded: --help and a mistyped option answer at once
    if not args.training:
        raise InputError("--test: evaluating a run is the work of test.py --config_file RUN/configs.yaml")
    from utils.device import out_of_memory, pick_device
    from utils.process_group import process_group, recall

    argv = sys.argv[1:] if argv is None else argv
    beginning = options_to_resume(args, checkpoint_to_resume(args), argv)
    device = pick_device(beginning[0].device)
    with process_group(device), out_of_memory(device, beginning[0].batch_size):
        begun = recall("run")
        if begun:  # torchrun has started the processes anew, after one that ended badly
            beginning = options_to_resume(get_args(argv), Path(begun) / "last.pth", argv)
        return train(*beginning)


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
    return newest_run(args)


def options_to_resume(args, checkpoint, argv):
    """(args, checkpoint, sentences): the options of the run that is resumed, the command line over them, and
    what then differs."""
    configs = checkpoint and checkpoint.parent / "configs.yaml"
    if not checkpoint or not configs.is_file():
        return args, checkpoint, []
    saved = vars(read_run_options(configs))
    if not args.config_file:
        args = get_args(["--config_file", str(configs), *argv])
    if args.activation == "auto":  # it was found when the run began
        args.activation = saved["activation"]
    changed = [
        f"{key} was {value} before and is {vars(args)[key]} from here on"
        for key, value in saved.items()
        if key not in ("resume", "resume_ckpt_file", "output_dir", "config_file", "debug")
        and vars(args)[key] != value
    ]
    return args, checkpoint, changed


def train(args, checkpoint=None, changed=()):
    """checkpoint: the run or the weights that it goes on with; changed: sentences about its options."""
    import torch

    from utils.checkpoint import load_checkpoint
    from utils.dist import number_of_gpus
    from utils.log import setup_logger
    from utils.run import RunFiles
    from utils.settings import precision_line, resolve

    goes_on = checkpoint and (checkpoint.parent / "configs.yaml").is_file()  # else it is a run of its own
    run = RunFiles(args, checkpoint.parent if goes_on else None)
    logger = setup_logger("IRRA")
    device = resolve(args).device  # before anything is loaded
    logger.info(f"Using {number_of_gpus(device)} GPUs")
    logger.info(precision_line(args, device))
    logger.info(run.described())
    for note in changed:
        logger.info(note)
    state = load_checkpoint(checkpoint) if checkpoint else None  # a bad one is found before data and model
    # for the new layers' weights; order, augmentation and masks have streams of their own
    torch.manual_seed(args.seed)
    training = build_training(args, device, run, state, checkpoint)
    if checkpoint and not training.resume(state, checkpoint):
        return
    del state
    return run_to_its_end(training, logger, fresh=not checkpoint)


def build_training(args, device, run, state=None, checkpoint=None):
    from datasets import build_dataloader
    from model.build import build_model, clip_to_resume, facts_to_keep
    from processor.division import gaussian_mixture
    from processor.training import Training
    from solver import WeightAverage, build_lr_scheduler, build_optimizer
    from utils.loading import leave_signals_to_parent

    *loaders, num_classes = build_dataloader(args)
    if args.division:  # what it lacks is known before weights are loaded and anything is written
        gaussian_mixture(len(loaders[0].dataset))
    for loader in loaders:
        loader.worker_init_fn = leave_signals_to_parent
    model = build_model(args, num_classes, state and clip_to_resume(args, state, checkpoint))
    run.found = {"activation": model.base_model.facts["activation"]}  # of `auto`
    run.kept = facts_to_keep(model)
    run.log.parent.info(f"Total params: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M")
    optimizer = build_optimizer(args, model)
    parts = {"model": model, "optimizer": optimizer, "scheduler": build_lr_scheduler(args, optimizer)}
    if args.ema:
        parts["ema"] = WeightAverage(model, args.ema)
    return Training(args, device, loaders, parts, run, retrieval_of)


def retrieval_of(features, ranking, img_loader, txt_loader):
    """Some queries of an evaluation with what they find, as TensorBoard shows it."""
    from retrieval.contact_sheet import gallery_paths, retrieval_picture
    from utils.dist import from_all

    paths = gallery_paths(img_loader.dataset, from_all(img_loader.left_out))
    return retrieval_picture(features, ranking.indices, paths, txt_loader.dataset.captions)


def run_to_its_end(training, logger, fresh):
    """Train, until it is done or stopped; the status to exit with. fresh: nothing of the run is saved yet."""
    from processor.trainer import NotFinite
    from utils.signals import Stopped, StopSignals

    run, log = training.run, training.run.log
    try:
        with StopSignals(log) as training.stop:
            run.open(logger, first_epoch=training.done["epoch"] + 1)
            if fresh:
                training.save()  # from here on there is something to resume, and room for it
            log.info("start training")
            training.fit()
    except NotFinite as error:
        raise InputError(f"{error}. The batch is described in {run.keep_evidence(error.evidence)}") from None
    except Stopped as reason:
        log.info(f"{reason}; all is saved, and --resume --resume_ckpt_file {run.folder} goes on from there")
        return STOPPED
    finally:
        training.close()
    if training.done["best_epoch"]:
        log.info(training.best())


if __name__ == "__main__":
    raise SystemExit(main())
