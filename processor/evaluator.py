"""Evaluation: features of captions and images, their ranking, the table."""

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F

from utils.metrics import rank_features

FIGURES = ("R1", "R5", "R10", "mAP", "mINP")
logger = logging.getLogger("IRRA.eval")


class Features(NamedTuple):
    """L2-normalised fp32 features and the ids they belong to, captions and images in their loaders' order."""

    text: torch.Tensor  # (Q, D)
    text_pids: torch.Tensor
    image: torch.Tensor  # (G, D)
    image_pids: torch.Tensor


@torch.no_grad()
def encode(model, img_loader, txt_loader, device, progress=False):
    """Features of a split. The model is put in eval mode and back."""
    was_training = model.training
    model.eval()
    captions = [(pids, ids) for pids, ids in txt_loader]
    text = encode_captions(model, torch.cat([ids for _, ids in captions]), len(captions[0][1]), device)
    pids, image = [], []
    for batch_pids, images in bar(img_loader, "images", progress):
        pids.append(batch_pids)
        image.append(F.normalize(model.encode_image(images.to(device)), dim=1))
    model.train(was_training)
    return Features(text, torch.cat([p for p, _ in captions]), torch.cat(image), torch.cat(pids))


def encode_captions(model, ids, batch_size, device):
    """(Q, L) ids to (Q, D): in order of length, each batch cut after its longest caption. The text encoder is
    causal and reads at EOT, so what follows EOT never mattered."""
    length = ids.argmax(dim=1) + 1
    order = length.argsort(stable=True)
    parts = []
    for rows in order.split(batch_size):
        part = ids[rows, : int(length[rows].max())].to(device)
        parts.append(F.normalize(model.encode_text(part), dim=1))
    text = torch.cat(parts)
    return torch.empty_like(text).index_copy_(0, order.to(text.device), text)


def bar(loader, what, progress):
    if not progress:
        return loader
    from tqdm import tqdm

    return tqdm(loader, desc=what, leave=False, disable=None)


def evaluate(features, i2t=False, max_rank=10):
    """{"t2i": figures} and with i2t {"i2t": figures}, dicts of R1 R5 R10 mAP mINP in %; and t2i's ranking."""
    text, text_pids, image, image_pids = features
    rankings = {"t2i": rank_features(text, image, text_pids, image_pids, max_rank)}
    if i2t:
        rankings["i2t"] = rank_features(image, text, image_pids, text_pids, max_rank)
    for task, ranking in rankings.items():
        if ranking.unmatched:
            logger.warning(
                f"{task}: {ranking.unmatched} queries have no match in the gallery; they count as misses"
            )
        if ranking.tied:
            logger.info(
                f"{task}: {ranking.tied} queries have tied similarities; the image listed first comes first"
            )
    return {task: figures(ranking) for task, ranking in rankings.items()}, rankings["t2i"]


def figures(ranking):
    cmc = ranking.cmc.tolist()
    return dict(zip(FIGURES, (cmc[0], cmc[4], cmc[9], float(ranking.mAP), float(ranking.mINP)), strict=True))


def chance(features, repeats=20, seed=0):
    """Figures of a random order, averaged over some."""
    from utils.metrics import rank_by

    generator = torch.Generator().manual_seed(seed)
    q_pids, g_pids = features.text_pids, features.image_pids
    drawn = [
        figures(
            rank_by(
                lambda rows: torch.rand(rows.stop - rows.start, len(g_pids), generator=generator),
                q_pids,
                g_pids,
            )
        )
        for _ in range(repeats)
    ]
    return {name: sum(figure[name] for figure in drawn) / repeats for name in FIGURES}


def table(rows):
    """The published log's table. rows: {task: {R1: …, …}}."""
    from prettytable import PrettyTable

    table = PrettyTable(["task", *FIGURES])
    for task, row in rows.items():
        table.add_row([task, *(f"{row[name]:.3f}" for name in FIGURES)])
    return table
