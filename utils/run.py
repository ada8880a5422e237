"""A run's folder, and what is written there."""

import argparse
import json
import logging
import os
from pathlib import Path

from utils.checkpoint import save_checkpoint
from utils.dist import from_main, process_index, world_size
from utils.errors import InputError
from utils.files import cannot_write, link_or_copy, lock, remove_leftovers, write_whole
from utils.log import keep_log
from utils.process_group import remember
from utils.run_folders import free_folder, new_run_folder


class RunFiles:
    """The folder of a run and what is written there: a new one, or `resumed`, that of the run which goes on.
    Of several processes the main one writes."""

    log = logging.getLogger("IRRA.train")

    def __init__(self, args, resumed=None):
        self.args, self.is_new = args, not resumed
        self.folder = Path(resumed) if resumed else from_main(new_run_folder(args))
        self.writes, self.events = process_index() == 0, None
        # of the weights: what configs.yaml says for `auto`, and what each checkpoint says besides
        self._lock, self.found, self.kept = None, {}, {}
        if resumed and self.writes:
            self._take()
        elif self.writes:
            self._check_place()

    def options(self):
        """{name: value} as published: output_dir is the run's own folder."""
        return {**vars(self.args), "output_dir": str(self.folder), "distributed": world_size() > 1}

    def described(self):
        """The options as the published log shows them."""
        return str(argparse.Namespace(**self.options())).replace(",", "\n")

    def open(self, logger, first_epoch=1):
        """Make the folder, start its log, its events and configs.yaml: now that data and model have proved
        good. Events of first_epoch and later, which an interrupted run has left, are taken back."""
        if not self.writes:
            return
        if self.is_new:
            self._make()
        remove_leftovers(self.folder)
        keep_log(logger, self.folder / "train_log.txt")
        self.save_configs()
        from torch.utils.tensorboard import SummaryWriter  # takes a second to load

        self.events = SummaryWriter(self.folder, purge_step=None if self.is_new else first_epoch)

    def _check_place(self):
        """Nothing is made yet, but where nothing can be is known before data and model are loaded."""
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        if why := cannot_write(there):
            raise InputError(f"cannot make the run folder {self.folder}: {why} (see --output_dir)")

    def _make(self):
        """Make the folder; under the next free name where a run begun in the same second has this one."""
        while True:
            try:
                self.folder.mkdir(parents=True)
                return self._take()
            except OSError as error:
                if not self.folder.exists():
                    what = f"cannot make the run folder {self.folder}: {error.strerror} (see --output_dir)"
                    raise InputError(what) from None
                self.folder = free_folder(self.folder.parent, self.args.name)

    def _take(self):
        """No two programs train one run: the second would write over what the first has saved."""
        try:
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError:
            return
        if not lock(self._lock):
            raise InputError(
                f"another program is training the run in {self.folder}: wait until it has ended, or stop it"
            )

    def board(self, epoch, **values):
        """Put named numbers on the TensorBoard."""
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, epoch)

    def picture(self, epoch, pixels):
        """Put a picture, uint8 [H, W, 3], on the TensorBoard."""
        if self.events:
            self.events.add_image("retrieval", pixels, epoch, dataformats="HWC")

    def save(self, name, parts, **values):
        """Write a checkpoint, whole or not at all; see utils.checkpoint."""
        if self.writes:
            save_checkpoint(self.folder / name, parts, num_epoch=self.args.num_epoch, **self.kept, **values)
            self.events.flush()
            if name == "last.pth":
                remember("run", str(self.folder.absolute()))  # should torchrun have to start it anew

    def close(self):
        if self.events:
            self.events.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save_configs(self):
        """configs.yaml as the published test.py reads it: every option, plain lists, no Python tags."""
        import yaml

        # the file can be a new run's --config_file
        options = {**self.options(), **self.found, "resume": False, "resume_ckpt_file": ""}
        del options["config_file"], options["debug"]
        write_whole(self.folder / "configs.yaml", yaml.safe_dump(options))

    def keep_numbered(self, epoch, keep):
        """Keep last.pth of the newest `keep` epochs as epoch_NNN.pth."""
        if not keep or not self.writes:
            return
        link_or_copy(self.folder / "last.pth", self.folder / f"epoch_{epoch:03d}.pth")
        there = {path.stem.removeprefix("epoch_"): path for path in self.folder.glob("epoch_*.pth")}
        numbered = {int(number): path for number, path in there.items() if number.isdecimal()}
        # those of later epochs are left of a course that the run has gone back from
        for number in sorted(numbered, key=lambda number: (number <= epoch, number))[:-keep]:
            numbered[number].unlink(missing_ok=True)

    def keep_evidence(self, evidence):
        """Write what is needed to look at a batch that failed; returns the file."""
        path = self.folder / "bad_batch.json"
        if self.writes:
            write_whole(path, json.dumps(evidence, indent=1) + "\n")
        return path
