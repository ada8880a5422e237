"""A second embedding out of the tokens that CLIP attends to most: TSE of RDE, arXiv 2308.09911.

Names of modules and parameters are the published ones, spelled so, since checkpoints hold them; some of the
parameters never take part: those are not trained. Legend: B batch, N tokens, D width, k selected tokens, E
width of the embedding.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.clip_model import at_least_fp32, take

EMBEDDING = 1024  # E


class Branch(nn.Module):
    """D to E by way of batch normalisation over all tokens of a batch; `bns.1` is not used."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, EMBEDDING)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(width), nn.BatchNorm1d(EMBEDDING)])
        self.bns[1].requires_grad_(False)

    def forward(self, x):
        """(B, k, D) to (B, k, E)."""
        first, second = self.layers
        normed = self.bns[0](at_least_fp32(first(x).flatten(0, 1)))  # its statistics are fp32
        return second(F.relu(normed).to(x.dtype).view_as(x))


class TokenSelection(nn.Module):
    """number: of the tokens that there are to select from. ratio: the fraction of them that is selected.

    norm: "train" normalises over the batch in training, as the published code does today; "eval" goes by the
    running statistics, which then never move, as it did when the paper's table was made.
    """

    def __init__(self, width, number, ratio=0.3, norm="eval"):
        super().__init__()
        self.k, self.norm = max(int(number * ratio), 1), norm
        self.linear = nn.Linear(width, EMBEDDING)
        self.mlp = Branch(width)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.mlp.bns.train(mode and self.norm == "train")
        return self

    def residual(self, x):
        return self.linear(x)

    def embed(self, tokens, weights, counting=None):
        """(B, E), fp32: the maximum over the selected tokens.

        tokens: (B, N, D). weights: (B, N), what they are selected by. counting: (B,) how many of the k count,
        if not all; the others only enter the batch's statistics.
        """
        k = min(self.k, weights.shape[1])
        x = take(weights.topk(k, dim=1).indices, tokens)  # (B, k, D)
        x = x / (x.norm(dim=2, keepdim=True) + 1e-8)
        x = x.to(self.linear.weight.dtype)
        x = at_least_fp32(self.residual(x) + self.mlp(x))  # (B, k, E)
        if counting is not None:
            left_out = torch.arange(k, device=x.device) >= counting[:, None]
            x = x.masked_fill(left_out[:, :, None], -torch.inf)
        return x.max(dim=1).values


class SelectedPatches(TokenSelection):
    """Of an image; its `linear` is not used."""

    def __init__(self, width, *how):
        super().__init__(width, *how)
        self.fc = nn.Linear(width, EMBEDDING)
        self.linear.requires_grad_(False)

    def residual(self, x):
        return self.fc(x)

    def forward(self, tokens, attention):
        """tokens: (B, 1 + N, D), the class token first. attention: (B, 1 + N), of that."""
        return self.embed(tokens, F.pad(attention[:, 1:], (1, 0), value=-1))


class SelectedWords(TokenSelection):
    """Of a caption, however short those at hand are cut."""

    def forward(self, tokens, attention, ids):
        """tokens: (B, L, D). attention: (B, L), of the EOT token. ids: (B, L).

        A caption without words, which spoils the rest of its batch in the published code, is its EOT token.
        """
        words = (ids != 0).sum(dim=1) - 2  # (B,)
        weights = torch.where(ids != 0, attention, 0)  # with a 0 the rest fills up
        weights = F.pad(weights[:, 1:], (1, 0), value=-1)
        ends = torch.where(words > 0, -1.0, 2.0).to(weights.dtype)[:, None]
        weights = weights.scatter(1, ids.argmax(dim=1, keepdim=True), ends)
        return self.embed(tokens, weights, words.clamp(min=1))
