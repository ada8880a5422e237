"""Evaluation: features of captions and images, their ranking, the table."""

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F

from utils.device import to_device
from utils.dist import gather, process_index
from utils.metrics import rank_by, rank_features
from utils.progress import progress_bar

RANKS = (1, 5, 10)  # of the table
FIGURES = (*(f"R{k}" for k in RANKS), "mAP", "mINP")
logger = logging.getLogger("IRRA.eval")


class Features(NamedTuple):
    """L2-normalised fp32 features and the ids they belong to, captions and images in their loaders' order."""

    text: torch.Tensor  # (Q, D)
    text_pids: torch.Tensor
    image: torch.Tensor  # (G, D)
    image_pids: torch.Tensor

    def of(self, columns):
        """Of one of several embeddings that stand side by side."""
        text, image = (F.normalize(features[:, columns], dim=1) for features in (self.text, self.image))
        return self._replace(text=text, image=image)


@torch.no_grad()
def encode(model, img_loader, txt_loader, device, progress=False):
    """Features of a split. The model is put in eval mode and back."""
    was_training = model.training
    model.eval()
    none = torch.empty(0, dtype=torch.long)  # a process's share may be empty
    captions = list(txt_loader)
    text_pids = torch.cat([none, *(pids for pids, _ in captions)])
    text = encode_captions(model, [ids for _, ids in captions], device)
    image_pids, image = [none], [no_features(model, device)]
    shown = progress_bar(len(img_loader), "images", progress)  # round the loader it would hold the last batch
    for batch in img_loader:
        image_pids.append(batch[0])
        image.append(F.normalize(model.encode_image(to_device(batch[1], device)), dim=1))
        del batch  # 0.3 GB for 512 images, else there until the next is loaded
        shown.update()
    shown.close()
    model.train(was_training)
    image_pids, text_pids = (gather(pids.to(device)).cpu() for pids in (torch.cat(image_pids), text_pids))
    return Features(gather(text), text_pids, gather(torch.cat(image)), image_pids)


def no_features(model, device):
    return torch.empty(0, model.width, device=device)


def encode_captions(model, batches, device):
    """Batches of (B, L) ids to (Q, D): in order of length, each batch cut after its longest caption. The text
    encoder is causal and reads at EOT, so what follows EOT never mattered."""
    if not batches:
        return no_features(model, device)
    ids = torch.cat(batches)
    length = ids.argmax(dim=1) + 1
    order = length.argsort(stable=True)
    parts = []
    for rows in order.split(len(batches[0])):
        part = to_device(ids[rows, : int(length[rows].max())], device)
        parts.append(F.normalize(model.encode_text(part), dim=1))
    text = torch.cat(parts)
    return torch.empty_like(text).index_copy_(0, order.to(text.device), text)


def evaluate(features, i2t=False):
    """{"t2i": figures} and with i2t {"i2t": figures}, dicts of FIGURES in %; and t2i's ranking."""
    text, text_pids, image, image_pids = features
    rankings = {"t2i": rank_features(text, image, text_pids, image_pids, max(RANKS))}
    if i2t:
        rankings["i2t"] = rank_features(image, text, image_pids, text_pids, max(RANKS))
    for task, ranking in rankings.items():
        unmatched, tied = ranking.unmatched, ranking.tied
        if unmatched and process_index() == 0:
            logger.warning(f"{task}: {unmatched} queries have no match in the gallery; they count as misses")
        if tied:
            logger.info(f"{task}: {tied} queries have tied similarities; the image listed first comes first")
    return {task: figures(ranking) for task, ranking in rankings.items()}, rankings["t2i"]


def figures(ranking):
    cmc = [float(ranking.cmc[k - 1]) for k in RANKS]
    return dict(zip(FIGURES, (*cmc, float(ranking.mAP), float(ranking.mINP)), strict=True))


def chance(features):
    """Figures of a random order, averaged over twenty."""
    generator = torch.Generator().manual_seed(0)
    q_pids, g_pids = features.text_pids, features.image_pids

    def similarity_of(rows):
        return torch.rand(rows.stop - rows.start, len(g_pids), generator=generator)

    drawn = [figures(rank_by(similarity_of, q_pids, g_pids, max(RANKS))) for _ in range(20)]
    return {name: sum(figure[name] for figure in drawn) / len(drawn) for name in FIGURES}


def log_table(rows):
    """As the published log has it. rows: {task: {R1: …, …}}."""
    from prettytable import PrettyTable

    table = PrettyTable(["task", *FIGURES])
    for task, row in rows.items():
        table.add_row([task, *(f"{row[name]:.3f}" for name in FIGURES)])
    logger.info(f"\n{table}")
