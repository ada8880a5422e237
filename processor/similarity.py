"""How well each word of each training caption shows in its image, kept from epoch to epoch: what NAM's
pretraining (arXiv 2405.04940) masks captions by."""

import torch

from datasets.tokenizer import START_SIMILARITY
from utils.batch import Batch
from utils.device import to_device
from utils.dist import gather, share_sizes


class WordSimilarities:
    """A loader's batches to train on, masked by what the last epoch found; of each it finds what the next one
    will mask by, with the weights before its step. What is found stays on the device until it is read.

    model: an IRRA, not wrapped. loader: a TrainLoader that masks by similarity. micro_batch: samples at once.
    """

    def __init__(self, model, loader, device, micro_batch=None):
        self.model, self.loader, self.device, self.micro_batch = model, loader, device, micro_batch
        self.ids = loader.dataset.caption_ids  # (N, L), not masked
        self.found = torch.full(self.ids.shape, START_SIMILARITY, device=device)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.note(Batch.of(batch))
            yield batch
            del batch  # not kept here while the next one is made

    def note(self, batch):
        """Of this process's share; in every process that of all."""
        ids = to_device(self.ids[batch.indices], self.device)
        step = self.micro_batch or max(len(ids), 1)
        parts = zip(batch.images.split(step), ids.split(step), strict=True)
        similarities = torch.cat([self.model.word_similarities(*part) for part in parts])
        indices = to_device(batch.indices, self.device)
        sizes = share_sizes(len(indices), self.device)
        self.found[gather(indices, sizes)] = gather(similarities, sizes)

    def begin_epoch(self):
        """Mask by what the last one has found."""
        self.loader.similarities = self.found.to("cpu", copy=True)

    def state(self):
        """(2, N, L): what this epoch masks by, and what is found so far."""
        return torch.stack([self.loader.similarities, self.found.cpu()])

    def load(self, state):
        """Go on from a `state`; one of other captions is of no use, and all begins anew."""
        if state.shape[1:] == self.ids.shape:
            self.loader.similarities = state[0]
            self.found.copy_(state[1])
