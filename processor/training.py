"""A run on its way: its epochs, what is kept of them, and how it goes on."""

import torch

from datasets.sampler import mixed
from model.build import facts_to_keep
from processor.division import careful, divide
from processor.evaluator import encode, evaluate, log_table
from processor.similarity import WordSimilarities
from processor.trainer import FiniteWatch, Meters, Steps, look_period, train_one_epoch
from solver import base_lr
from solver.restore import fit_groups, load_optimizer
from utils.checkpoint import load_weights
from utils.dist import any_process, replicate, world_size
from utils.errors import InputError
from utils.losses import LOSSES, is_loss, names_of
from utils.signals import Stopped

OF_ORDER = ("seed", "sampler")  # options that an epoch's order depends on, kept to be compared


class Training:
    """What is trained, `done`, how far it is, and the run's folder.

    parts: model, optimizer, scheduler and, with --ema, ema; what a checkpoint holds. run: a RunFiles.
    picture: a function of features, ranking and the two loaders, for TensorBoard.
    """

    def __init__(self, args, device, loaders, parts, run, picture):
        self.args, self.device, self.parts, self.run, self.picture = args, device, parts, run, picture
        self.model, self.optimizer, self.scheduler = parts["model"], parts["optimizer"], parts["scheduler"]
        self.ema = parts.get("ema")
        self.train_loader, self.img_loader, self.txt_loader = loaders
        self.stop = None  # the StopSignals of the time in which it trains
        self.done = {"epoch": 0, "iteration": 0, "samples": 0, "to_evaluate": False, "meters": {}}
        self.done.update(best_R1=-1.0, best_epoch=0)
        self.done.update({key: vars(args)[key] for key in OF_ORDER})
        if args.division:
            self.done["label_hat"] = torch.empty(0, dtype=torch.uint8)  # the weights of this epoch's samples
        self.words = None
        if args.mask_by_similarity:
            self.words = WordSimilarities(self.model, self.train_loader, device, args.micro_batch)
            self.done["word_similarities"] = torch.empty(2, 0, 0)
        if self.ema:
            self.done.update(best_ema_R1=-1.0, best_ema_epoch=0)

    def fit(self):
        """The epochs that are not done yet: train, evaluate, keep the best and the last."""
        args, done = self.args, self.done
        model = replicate(self.model, self.device, args.micro_batch)
        self.evaluate_if_due()  # the epoch that an interrupted run has trained
        for epoch in range(done["epoch"] + 1, args.num_epoch + 1):
            averages = self.train_epoch(model, epoch)
            shown = {name: value for name, value in averages.items() if value}  # no zeros, as published
            self.run.board(epoch, lr=base_lr(self.optimizer), **shown)
            self.scheduler.step()
            # a run shorter than its evaluation period is evaluated at its end
            due = epoch % args.eval_period == 0 or epoch == args.num_epoch < args.eval_period
            done.update(epoch=epoch, iteration=0, samples=0, meters={}, to_evaluate=due)
            self.save()
            self.run.keep_numbered(epoch, args.keep)
            self.evaluate_if_due()
            if epoch < args.num_epoch:
                self.leave_if_asked()

    def train_epoch(self, model, epoch):
        """What is left of an epoch; returns its averages by name. model: as the processes train it."""
        args, done = self.args, self.done
        self.model.epochs_done = done["epoch"]
        if self.words is not None and not done["samples"]:
            self.words.begin_epoch()
        if args.division:
            self.divide(epoch)
        self.train_loader.set_epoch(epoch, samples=done["samples"])
        last, samples = done["iteration"] + len(self.train_loader), self.train_loader.samples_of_epoch()

        def before_step(step):
            fraction = self.samples_after(step - 1) / samples
            self.scheduler.within_epoch(fraction)
            self.model.epochs_done = done["epoch"] + fraction

        watch = FiniteWatch(model, self.optimizer, epoch, look_period(self.device, args.log_period))
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
        averages = train_one_epoch(model, batches, self.optimizer, self.device, epoch, steps)
        before_step(last)  # its rate is shown, also where the run was stopped after it and none is left here
        return averages

    def divide(self, epoch):
        """Weigh the samples for this epoch; one that was interrupted goes on with the weights it had."""
        args, done, loader = self.args, self.done, self.train_loader
        if not done["samples"] or len(done["label_hat"]) != len(loader.dataset):
            loader.set_epoch(epoch)
            seed, strict = mixed(args.seed, epoch, 4), careful(args, loader.moved)
            weights, counts = divide(self.model, loader, self.device, seed, strict, self.leave_if_asked)
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
        """Where nothing is kept of what the epoch at hand has done."""
        if any_process(self.stop.asked, self.device):
            raise Stopped(f"stopped after epoch {self.done['epoch']}")

    def samples_after(self, step):
        """Samples of the epoch that are done after this step, the earlier ones in batches of any size."""
        return self.done["samples"] + (step - self.done["iteration"]) * self.args.batch_size

    def after_step(self, step, meters, watch):
        """Average the weights; save within the epoch, and leave, where that is due."""
        if self.ema:
            self.ema.update(watch.left_out)
        if self.stop.again:  # a callback of Python's own, as those of a fork, swallowed the interrupt
            raise KeyboardInterrupt
        period = self.args.save_period
        # several processes with accelerators ask one another now and then only: that makes them wait
        asks = world_size() == 1 or self.device.type == "cpu" or step % 10 == 0
        stopped = asks and any_process(self.stop.asked, self.device)
        if stopped or (period and step % period == 0):
            watch.look()  # what a bad step was left out of is not saved as if it had been taken
            self.save(iteration=step, samples=self.samples_after(step), meters=meters.state_dict())
        if stopped:
            raise Stopped(f"stopped in epoch {self.done['epoch'] + 1} after iteration {step}")

    def evaluate_if_due(self):
        """What may fail comes after the saving; a run that was ended in it evaluates when it goes on."""
        done, run = self.done, self.run
        if not done["to_evaluate"]:
            return
        epoch = done["epoch"]
        R1, ema_R1 = self.evaluate(epoch)
        if R1 > done["best_R1"]:
            done.update(best_R1=R1, best_epoch=epoch)
            run.log.info(f"Saving checkpoint to {run.folder / 'best.pth'}")
            run.save("best.pth", self.parts, iteration=0, epoch=epoch)
        if self.ema and ema_R1 > done["best_ema_R1"]:
            done.update(best_ema_R1=ema_R1, best_ema_epoch=epoch)
            run.log.info(f"Saving checkpoint to {run.folder / 'best_ema.pth'}")
            with self.ema.in_place():  # the weights alone: it is to be tested, not to be trained on
                run.save("best_ema.pth", {"model": self.model}, iteration=0, epoch=epoch)
        done.update(to_evaluate=False)
        self.save()
        run.keep_numbered(epoch, self.args.keep)

    def evaluate(self, epoch):
        """Table, TensorBoard's figures and its picture; returns text-to-image R1 of the weights and of their
        average (None without). A function of its own, so that no feature stays on the device afterwards."""
        loaders = self.img_loader, self.txt_loader
        self.run.log.info(f"Validation Results - Epoch: {epoch}")
        features = encode(self.model, *loaders, self.device)
        rows, ranking = evaluate(features, i2t=True)
        if self.ema:
            with self.ema.in_place():
                averaged, _ = evaluate(encode(self.model, *loaders, self.device), i2t=True)
            rows.update({f"{task}_ema": figures for task, figures in averaged.items()})
        log_table({task: figures for task, figures in rows.items() if task.startswith("t2i")})
        for task, figures in rows.items():
            self.run.board(epoch, **{f"{task}/{name}": value for name, value in figures.items()})
        self.run.picture(epoch, self.picture(features, ranking, *loaders))
        return rows["t2i"]["R1"], rows["t2i_ema"]["R1"] if self.ema else None

    def save(self, **within_epoch):
        if self.words is not None:
            self.done["word_similarities"] = self.words.state()
        self.run.save("last.pth", self.parts, **{**self.done, **within_epoch})

    def resume(self, state, checkpoint):
        """Go on from a checkpoint's state; False where nothing is left to do."""
        args, done, log = self.args, self.done, self.run.log
        done.update(restore(self.parts, done, state, checkpoint))
        if "best_R1" not in state:  # best.pth has the published parts only; what goes on from it must beat it
            done["to_evaluate"] = True
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
        check_rest_of_epoch(args, done, {key: state.get(key, done[key]) for key in OF_ORDER})
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


def check_rest_of_epoch(args, done, begun):
    """An epoch that was stopped goes on with the samples that are left, whatever the batch size is now, and
    with its averages, unless the losses are others now. begun: what it has begun with of OF_ORDER."""
    if {*filter(is_loss, done["meters"].get("names", ()))} != {f"{name}_loss" for name in names_of(args)}:
        done["meters"] = {}
    # earlier checkpoints count batches only
    done["samples"] = done["samples"] or done["iteration"] * args.batch_size
    for key, value in begun.items() if done["samples"] else ():
        if value != done[key]:
            raise InputError(
                f"--{key} {done[key]} is not what this epoch began with, which its order depends on: end it "
                f"with {value} first"
            )
    if args.sampler == "identity" and done["samples"] != done["iteration"] * args.batch_size:
        raise InputError(
            f"--batch_size {args.batch_size} is not the one that this epoch began with, and the identity "
            "sampler's order depends on it: end the epoch with the earlier one first"
        )
    done["iteration"] = done["samples"] // args.batch_size


def restore(parts, done, state, source):
    """Put a checkpoint's parts back; returns what it says of what `done` holds. Of a published one the
    weights fit, but not the optimiser."""
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
    kept = {key: state[key] for key in done if key in state and key not in OF_ORDER}
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
    if saved is None:
        return ema.begin()
    if not isinstance(saved, dict):
        raise InputError(f"{source} cannot be resumed: its ema part is damaged")
    load_weights(ema, saved, f"{source}, its ema part,")
