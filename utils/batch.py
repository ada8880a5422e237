"""A batch of training pairs: every field named and shaped once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from utils.device import to_device

# the fields that Batch.planned finds
PLAN = ("text_length", "second_length", "same_caption", "mlm_at", "mlm_rows")
LENGTH_STEP = 16  # clean captions are encoded at a length that is a multiple of this, or whole


@dataclass(eq=False)
class Batch(Mapping):
    """A batch, a process's share of one, or a part of that. B samples, L text length, M and n as said below.

    Ids are on the host until `to` moves them: there the batch plans its work. It reads like a dict of what it
    holds, `batch["pids"]`, which is how the published code and its forks have it.
    """

    pids: torch.Tensor  # (B,) training person, 0 … K - 1
    images: torch.Tensor | None = None  # (B, 3, H, W) normalised floats, on the device
    caption_ids: torch.Tensor | None = None  # (B, L) what every loss but mlm sees: masked too, as published
    second_images: torch.Tensor | None = None  # (B, 3, H, W) of --second_view: the same images, drawn anew
    strong_images: torch.Tensor | None = None  # (B, 2, 3, H, W) two views of each, for simclr
    image_ids: torch.Tensor | None = None  # (B,) counts the training images
    mlm_ids: torch.Tensor | None = None  # (B, L) the masked caption
    mlm_labels: torch.Tensor | None = None  # (B, L) the token that was masked; 0 where none was
    second_caption_ids: torch.Tensor | None = None  # (B, L) what --second_caption draws
    second_factor: torch.Tensor | None = None  # (B,) of its losses: one number, that of the epoch
    label_hat: torch.Tensor | None = None  # (B,) what a sample's rows count for in the losses; 1 where absent
    indices: torch.Tensor | None = None  # (B,) counts the training captions
    batch_size: int | None = None  # samples of all processes together, where there are several
    more: dict = field(default_factory=dict)  # what else a data set of your own gives, a row a sample

    # what `planned` finds, so that nothing is computed in vain
    text_length: int | None = None  # up to the last EOT: a causal encoder does not see what follows
    second_length: int | None = None  # the same of second_caption_ids
    same_caption: bool | None = None  # every loss sees the masked caption: one text pass serves all
    mlm_at: torch.Tensor | None = None  # (B, M) the positions with a label, filled up with others
    mlm_rows: torch.Tensor | None = None  # (n,) where, in (B · M), there is a label

    @classmethod
    def of(cls, batch):
        """A Batch as it is; or one of a dict with its keys, and any others of your own."""
        if isinstance(batch, cls):
            return batch
        own = {name.name for name in fields(cls)}
        more = {key: value for key, value in batch.items() if key not in own}
        return cls(**{key: value for key, value in batch.items() if key in own}, more=more)

    def _held(self):
        named = {name.name: getattr(self, name.name) for name in fields(self) if name.name != "more"}
        return {key: value for key, value in {**named, **self.more}.items() if value is not None}

    def __getitem__(self, key):
        return self._held()[key]

    def __iter__(self):
        return iter(self._held())

    def __len__(self):
        return len(self._held())

    @property
    def samples(self):
        """B, of all processes."""
        return len(self.pids) if self.batch_size is None else self.batch_size

    def ids(self):
        """What tells its samples; small, and on the host."""
        return {key: self[key] for key in ("pids", "image_ids", "caption_ids") if key in self}

    def known(self):
        """What losses may ask of its samples beside features, by the name of an argument: {name: (B,)}."""
        weights = None if self.label_hat is None else self.label_hat.float()
        known = {"pids": self.pids, "weights": weights, "second_factor": self.second_factor}
        return {name: value for name, value in known.items() if value is not None}

    def parts(self, size=None):
        """The batch in parts of `size` samples, or whole. An empty one, a process's share, is one part."""
        B = max(len(self.pids), 1)
        return [self.part(slice(start, start + (size or B))) for start in range(0, B, size or B)]

    def part(self, rows):
        """Those samples, not planned yet. rows: a slice."""
        held = {key: value for key, value in self._held().items() if key not in PLAN}
        kinds = (torch.Tensor, list, tuple)  # sentences, say, come as a list
        return Batch.of({key: value[rows] for key, value in held.items() if isinstance(value, kinds)})

    def planned(self):
        """With what the model must know of the ids to waste nothing; found on the host. Lengths are rounded
        up, so that a GPU meets few of them."""
        if self.text_length is not None:
            return self
        ids, labels = self.caption_ids, self.mlm_labels
        plan = {"text_length": encoded_length(ids)}
        if self.second_caption_ids is not None:
            plan["second_length"] = encoded_length(self.second_caption_ids)
        if labels is not None:
            labelled = labels != 0
            most = max(labelled.sum(dim=1).tolist(), default=1) or 1
            at = labelled.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            plan["mlm_at"] = at
            plan["mlm_rows"] = labelled.gather(1, at).flatten().nonzero()[:, 0]
            plan["same_caption"] = torch.equal(ids, self.mlm_ids)
        return replace(self, **plan)

    def to(self, device):
        """With its tensors on the device."""
        return Batch.of({key: to_device(value, device) for key, value in self._held().items()})


def encoded_length(ids):
    """How much of (B, L) captions is to be encoded: up to the last EOT, rounded up."""
    longest = max((ids.argmax(dim=1) + 1).tolist(), default=1)  # a process's share may be empty
    return min(-(-longest // LENGTH_STEP) * LENGTH_STEP, ids.shape[1])
