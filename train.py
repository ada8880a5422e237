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
    from utils.dist import process_group, recall

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

    from processor.trainer import NotFinite
    from utils.checkpoint import load_checkpoint
    from utils.run import RunFiles, Stopped, StopSignals, setup_logger
    from utils.settings import resolve

    goes_on = checkpoint and (checkpoint.parent / "configs.yaml").is_file()  # else it is a run of its own
    run = RunFiles(args, checkpoint.parent if goes_on else None)
    logger = setup_logger("IRRA")
    settings = resolve(args)  # before anything is loaded
    log_beginning(logger, args, settings, run)
    for note in changed:
        logger.info(note)
    state = load_checkpoint(checkpoint) if checkpoint else None  # a bad one is found before data and model
    # for the new layers' weights; order, augmentation and masks have streams of their own
    torch.manual_seed(args.seed)
    training = build_training(args, settings.device, run)
    if checkpoint and not training.resume(state, checkpoint):
        return
    del state
    try:
        with StopSignals(run.log) as training.stop:
            run.open(args, logger, first_epoch=training.done["epoch"] + 1)
            if not checkpoint:
                training.save()  # from here on there is something to resume, and room for it
            run.log.info("start training")
            training.fit()
    except NotFinite as error:
        raise InputError(f"{error}. The batch is described in {run.keep_evidence(error.evidence)}") from None
    except Stopped as reason:
        run.log.info(
            f"{reason}; all is saved, and --resume --resume_ckpt_file {run.folder} goes on from there"
        )
        return STOPPED
    finally:
        training.close()
    if training.done["best_epoch"]:
        run.log.info(training.best())


def log_beginning(logger, args, settings, run):
    from utils.dist import number_of_gpus
    from utils.settings import precision_line

    logger.info(f"Using {number_of_gpus(settings.device)} GPUs")
    logger.info(precision_line(args, settings.device))
    logger.info(run.described(args))


def build_training(args, device, run):
    from datasets import build_dataloader
    from model.build import build_model, facts_to_keep
    from processor.division import gaussian_mixture
    from solver import WeightAverage, build_lr_scheduler, build_optimizer
    from utils.run import leave_signals_to_parent

    *loaders, num_classes = build_dataloader(args)
    if args.division:  # what it lacks is known before weights are loaded and anything is written
        gaussian_mixture(len(loaders[0].dataset))
    for loader in loaders:
        loader.worker_init_fn = leave_signals_to_parent
    model = build_model(args, num_classes)
    run.found = {"activation": model.base_model.facts["activation"]}  # of `auto`
    run.kept = facts_to_keep(model)
    run.log.parent.info(f"Total params: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M")
    optimizer = build_optimizer(args, model)
    parts = {"model": model, "optimizer": optimizer, "scheduler": build_lr_scheduler(args, optimizer)}
    if args.ema:
        parts["ema"] = WeightAverage(model, args.ema)
    return Training(args, device, loaders, parts, run)


class Training:
    """A run on its way: what is trained, `done`, how far it is, and the run's folder."""

    def __init__(self, args, device, loaders, parts, run):
        import torch

        self.args, self.device, self.parts, self.run = args, device, parts, run
        self.train_loader, self.img_loader, self.txt_loader = loaders
        self.stop = None  # the StopSignals of the time in which it trains
        self.done = {"epoch": 0, "iteration": 0, "samples": 0, "to_evaluate": False, "meters": {}}
        self.done.update({"best_R1": -1.0, "best_epoch": 0, "seed": args.seed})
        if args.division:
            self.done["label_hat"] = torch.empty(0, dtype=torch.uint8)  # the weights of this epoch's samples
        self.words = None
        if args.mask_by_similarity:
            from processor.similarity import WordSimilarities

            self.words = WordSimilarities(parts["model"], self.train_loader, device, args.micro_batch)
            self.done["word_similarities"] = torch.empty(2, 0, 0)
        self.ema = parts.get("ema")
        if self.ema:
            self.done.update({"best_ema_R1": -1.0, "best_ema_epoch": 0})

    def fit(self):
        """The epochs that are not done yet: train, evaluate, keep the best and the last."""
        from solver import base_lr
        from utils.dist import any_process, replicate
        from utils.run import Stopped

        args, done, scheduler = self.args, self.done, self.parts["scheduler"]
        model = replicate(self.parts["model"], self.device, args.micro_batch)
        self.evaluate_if_due()  # the epoch that an interrupted run has trained
        for epoch in range(done["epoch"] + 1, args.num_epoch + 1):
            averages = self.train_epoch(model, epoch)
            shown = {name: value for name, value in averages.items() if value > 0}  # no zeros, as published
            self.run.board(epoch, lr=base_lr(self.parts["optimizer"]), **shown)
            scheduler.step()
            # a run shorter than its evaluation period is evaluated at its end
            due = epoch % args.eval_period == 0 or epoch == args.num_epoch < args.eval_period
            done.update(epoch=epoch, iteration=0, samples=0, meters={}, to_evaluate=due)
            self.save()
            self.run.keep_numbered(epoch, args.keep)
            self.evaluate_if_due()
            if epoch < args.num_epoch and any_process(self.stop.asked, self.device):
                raise Stopped(f"stopped after epoch {epoch}")

    def train_epoch(self, model, epoch):
        """What is left of an epoch; returns its averages by name."""
        from processor.trainer import FiniteWatch, Meters, Steps, look_period, train_one_epoch

        args, done = self.args, self.done
        self.parts["model"].epochs_done = done["epoch"]
        if self.words is not None and not done["samples"]:
            self.words.begin_epoch()
        self.divide(model, epoch)
        self.train_loader.set_epoch(epoch, samples=done["samples"])
        last, samples = done["iteration"] + len(self.train_loader), self.train_loader.samples_of_epoch()

        def before_step(step):
            fraction = self.samples_after(step - 1) / samples
            self.parts["scheduler"].within_epoch(fraction)
            self.parts["model"].epochs_done = done["epoch"] + fraction

        watch = FiniteWatch(model, self.parts["optimizer"], epoch, look_period(self.device, args.log_period))
        steps = Steps(
            log_period=args.log_period,
            batch_size=args.batch_size,
            micro_batch=args.micro_batch,
            max_grad_norm=args.max_grad_norm,
            start=done["iteration"],
            meters=Meters.from_state(done["meters"]),
            watch=watch,
            before_step=before_step,
            after_step=lambda step, meters: self.after_step(step, meters, watch),
        )
        batches = self.train_loader if self.words is None else self.words
        averages = train_one_epoch(model, batches, self.parts["optimizer"], self.device, epoch, steps)
        before_step(last)  # its rate is shown, also where the run was stopped after it and none is left here
        return averages

    def divide(self, model, epoch):
        """Weigh the samples for this epoch; one that was interrupted goes on with the weights it had."""
        from datasets.sampler import mixed
        from processor.division import careful, divide
        from utils.dist import unwrapped
        from utils.losses import LOSSES, names_of

        args, done = self.args, self.done
        if not args.division:
            return
        loader = self.train_loader
        if not done["samples"] or len(done["label_hat"]) != len(loader.dataset):
            loader.set_epoch(epoch)
            seed, strict = mixed(args.seed, epoch, 4), careful(args, loader.moved)
            weights, counts = divide(unwrapped(model), loader, self.device, seed, strict, self.leave_if_asked)
            done["label_hat"] = weights.byte()
            both, one, none = counts
            unheeding = [name for name in names_of(args) if not (LOSSES[name].each or LOSSES[name].switches)]
            self.run.log.info(
                f"Epoch[{epoch}] clean pairs: {both}, doubtful: {one}, left out: {none}; "
                f"{int(weights.sum())} of {len(weights)} count"
                + (f"; in {', '.join(unheeding)} all of them" if unheeding else "")
            )
        loader.weights = done["label_hat"].float()

    def leave_if_asked(self):
        """Within what nothing is kept of."""
        from utils.dist import any_process
        from utils.run import Stopped

        if any_process(self.stop.asked, self.device):
            raise Stopped(f"stopped after epoch {self.done['epoch']}")

    def samples_after(self, step):
        """Samples of the epoch that are done after this step, the earlier ones in batches of any size."""
        return self.done["samples"] + (step - self.done["iteration"]) * self.args.batch_size

    def after_step(self, step, meters, watch):
        """Average the weights; save within the epoch, and leave, where that is due."""
        from utils.dist import any_process, world_size
        from utils.run import Stopped

        if self.ema:
            self.ema.update(watch.left_out)
        if self.stop.again:  # a callback of Python's own, as those of a fork, swallowed the interrupt
            raise KeyboardInterrupt
        args, done = self.args, self.done
        # several processes with accelerators ask one another now and then only: that makes them wait
        asks = world_size() == 1 or self.device.type == "cpu" or step % 10 == 0
        stopped = asks and any_process(self.stop.asked, self.device)
        if stopped or (args.save_period and step % args.save_period == 0):
            watch.look()  # what a bad step was left out of is not saved as if it had been taken
            self.save(iteration=step, samples=self.samples_after(step), meters=meters.state_dict())
        if stopped:
            raise Stopped(f"stopped in epoch {done['epoch'] + 1} after iteration {step}")

    def evaluate_if_due(self):
        """What may fail comes after the saving; a run that was ended in it evaluates when it goes on."""
        done, run = self.done, self.run
        if not done["to_evaluate"]:
            return
        epoch = done["epoch"]
        model, loaders = self.parts["model"], (self.img_loader, self.txt_loader)
        R1, ema_R1 = evaluate_epoch(model, self.ema, *loaders, self.device, run, epoch)
        if R1 > done["best_R1"]:
            done.update(best_R1=R1, best_epoch=epoch)
            run.log.info(f"Saving checkpoint to {run.folder / 'best.pth'}")
            run.save("best.pth", self.parts, iteration=0, epoch=epoch)
        if self.ema and ema_R1 > done["best_ema_R1"]:
            done.update(best_ema_R1=ema_R1, best_ema_epoch=epoch)
            run.log.info(f"Saving checkpoint to {run.folder / 'best_ema.pth'}")
            with self.ema.in_place():  # the weights alone: it is to be tested, not to be trained on
                run.save("best_ema.pth", {"model": model}, iteration=0, epoch=epoch)
        done.update(to_evaluate=False)
        self.save()
        run.keep_numbered(epoch, self.args.keep)

    def save(self, **within_epoch):
        if self.words is not None:
            self.done["word_similarities"] = self.words.state()
        self.run.save("last.pth", self.parts, **{**self.done, **within_epoch})

    def resume(self, state, checkpoint):
        """Go on from a checkpoint's state; False where nothing is left to do."""
        args, done, log = self.args, self.done, self.run.log
        done.update(restore(self.parts, done, state, checkpoint))
        if self.words is not None:
            self.words.load(done["word_similarities"])
        if self.ema and "ema" not in state:
            log.info(f"{checkpoint} holds no averaged weights: the average begins with its weights")
        if done["epoch"] >= args.num_epoch and not done["to_evaluate"]:
            log.info(f"{checkpoint} has all {args.num_epoch} epochs: nothing is left to do ({self.best()})")
            return False
        log.info(
            f"resumed from {checkpoint}: {done['epoch']} epochs and {done['iteration']} iterations are done"
        )
        check_rest_of_epoch(args, done)
        return True

    def best(self):
        done = self.done
        said = f"best R1: {done['best_R1']} at epoch {done['best_epoch']}"
        if self.ema:
            said += f"; averaged weights: {done['best_ema_R1']} at epoch {done['best_ema_epoch']}"
        return said

    def close(self):
        self.run.close()
        self.train_loader.close()
        for loader in (self.train_loader, self.img_loader):
            for reason in loader.left_out.values():
                self.run.log.warning(f"was left out: {reason}")


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


def evaluate_epoch(model, ema, img_loader, txt_loader, device, run, epoch):
    """Table, TensorBoard's figures and its picture; returns text-to-image R1 of the weights and of their
    average (None without). A function of its own, so that no feature stays on the device afterwards."""
    from processor.evaluator import encode, evaluate, log_table
    from retrieval.contact_sheet import gallery_paths, retrieval_picture
    from utils.dist import from_all

    run.log.info(f"Validation Results - Epoch: {epoch}")
    features = encode(model, img_loader, txt_loader, device)
    rows, ranking = evaluate(features, i2t=True)
    if ema:
        with ema.in_place():
            averaged, _ = evaluate(encode(model, img_loader, txt_loader, device), i2t=True)
        rows.update({f"{task}_ema": figures for task, figures in averaged.items()})
    log_table({task: figures for task, figures in rows.items() if task.startswith("t2i")})
    for task, figures in rows.items():
        run.board(epoch, **{f"{task}/{name}": value for name, value in figures.items()})
    paths = gallery_paths(img_loader.dataset, from_all(img_loader.left_out))
    run.picture(epoch, retrieval_picture(features, ranking.indices, paths, txt_loader.dataset.captions))
    return rows["t2i"]["R1"], rows["t2i_ema"]["R1"] if ema else None


def restore(parts, done, state, source):
    """Put a checkpoint's parts back; returns what it says of what `done` holds. Of a published one the
    weights fit, but not the optimiser."""
    from model.build import facts_to_keep
    from utils.checkpoint import fit_groups, load_optimizer, load_weights

    model, optimizer = parts["model"], parts["optimizer"]
    saved = fit_groups(optimizer, state.get("optimizer"), model, state["model"], source)
    load_weights(model, state["model"], source)
    if state.get("clip") != facts_to_keep(model).get("clip"):
        raise InputError(
            f"{source} cannot be resumed: its weights were trained with {state.get('clip')}, the run now has "
            f"{facts_to_keep(model).get('clip')} (see --activation; None: as OpenAI's)"
        )
    load_optimizer(optimizer, saved, source)
    if "ema" in parts:
        restore_average(parts["ema"], state.get("ema"), source)
    kept = {key: state[key] for key in done if key in state and key != "seed"}
    try:
        parts["scheduler"].load_state_dict(state["scheduler"])
        wrong = next((key for key, value in kept.items() if not isinstance(value, type(done[key]))), None)
    except (KeyError, TypeError) as error:
        wrong = f"scheduler ({error!r})"
    if wrong or "epoch" not in kept:
        raise InputError(f"{source} cannot be resumed: its part {wrong or 'epoch'} is missing or damaged")
    return kept


def restore_average(ema, saved, source):
    """Put the average back, or begin it with the weights, which have been put back, where none was kept."""
    from utils.checkpoint import load_weights

    if saved is None:
        return ema.begin()
    if not isinstance(saved, dict):
        raise InputError(f"{source} cannot be resumed: its ema part is damaged")
    load_weights(ema, saved, f"{source}, its ema part,")


if __name__ == "__main__":
    raise SystemExit(main())
