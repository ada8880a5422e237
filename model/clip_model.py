"""CLIP with a vision transformer, as IRRA uses it: every token is projected, not only the class or EOT one.

Parameter names and shapes are OpenAI's (https://github.com/openai/CLIP), so that its archives and everybody's
checkpoints load. Tensors are batch-first. Legend: B batch, N image tokens, L text length, D joint width.
"""

import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def at_least_fp32(x):
    """x in fp32, as published; float64 stays, so that tests can compute in it."""
    return x if x.dtype == torch.float64 else x.float()


class LayerNorm(nn.LayerNorm):
    """Computes in fp32 whatever its input, and gives the input's type back."""

    def forward(self, x):
        return super().forward(at_least_fp32(x)).type_as(x)


class QuickGELU(nn.Module):
    """x · σ(1.702 x)."""

    def forward(self, x):
        # without gradients plain operations: a Function of one's own crashes the ONNX export of PyTorch 2.6
        return _QuickGELU.apply(x) if torch.is_grad_enabled() else quick_gelu(x)


def quick_gelu(x):
    return (1.702 * x).sigmoid_().mul_(x)


class _QuickGELU(torch.autograd.Function):
    """Keeps x alone for the backward pass: autograd would also keep the sigmoid, a fifth of a block."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return quick_gelu(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        # the function is silu(1.702 x) / 1.702, so its slope at x is silu's at 1.702 x
        return torch.ops.aten.silu_backward(gradient, 1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's; that of most others


def attend(attn, query, tokens, causal=False):
    """What `attn` (an nn.MultiheadAttention, which holds the weights) computes, by the fused kernel.

    query: (B, Q, D). tokens: (B, K, D), keys and values. causal: query i sees tokens 0…i. Returns (B, Q, D).
    """
    B, Q, D = query.shape
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if query is tokens:
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
    else:
        q = F.linear(query, weight[:D], bias[:D])
        k, v = F.linear(tokens, weight[D:], bias[D:]).chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, Q, D / heads)
    return attn.out_proj(x.transpose(1, 2).reshape(B, Q, D))


@torch.no_grad()
def attention_row(attn, x, at, causal=False):
    """How much each token counts for one of them, averaged over heads: (B, N), fp32, without gradient.

    x: (B, N, D), as `attend` sees it. at: (B,), whose row it is.
    """
    B, N, D = x.shape
    wq, wk, _ = attn.in_proj_weight.chunk(3)
    bq, bk, _ = attn.in_proj_bias.chunk(3)
    q = F.linear(x[torch.arange(B, device=x.device), at], wq, bq).view(B, attn.num_heads, 1, -1)
    k = F.linear(x, wk, bk).view(B, N, attn.num_heads, -1).permute(0, 2, 3, 1)
    scores = at_least_fp32(q @ k)[:, :, 0] * (D // attn.num_heads) ** -0.5  # (B, heads, N)
    if causal:
        later = torch.arange(N, device=x.device) > at[:, None]
        scores = scores.masked_fill(later[:, None], -torch.inf)
    return scores.softmax(dim=2).mean(dim=1)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, causal=False, activation="quick_gelu"):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=ACTIVATIONS[activation](),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = LayerNorm(width)
        self.causal = causal

    def forward(self, x, pick=None, at=None, most=None):
        """x: (B, N, W). pick: takes (B, N, W) to the (B, M, W) whose outputs are wanted.

        Exact: a token's output needs the other tokens only as keys and values. Not with a causal mask.
        at: (B,), of which the attention_row is returned too. With `most` only the outputs of the first token
        and of the `most` others that count most for it are computed; the row then is of those.
        """
        normed = self.ln_1(x)
        row = None if at is None else attention_row(self.attn, normed, at, self.causal)
        if most is not None:
            among = 1 + row[:, 1:].topk(most, dim=1).indices
            among = torch.cat([torch.zeros_like(among[:, :1]), among], dim=1)  # (B, 1 + most)
            row, pick = row.gather(1, among), functools.partial(take, among)
        if pick is None:
            x = x + attend(self.attn, normed, normed, self.causal)
        else:
            x = pick(x) + attend(self.attn, pick(normed), normed)
        x = x + self.mlp(self.ln_2(x))
        return x if at is None else (x, row)


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, causal=False, activation="quick_gelu"):
        super().__init__()
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, causal, activation) for _ in range(layers))
        )
        self.checkpointing = False  # --grad_checkpointing: keep a block's input only, compute the rest again

    def initialise(self, width):
        """CLIP's own, of the text encoder and of IRRA's interaction encoder."""
        layers = len(self.resblocks)
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, x, pick=None, at=None, most=None, skip=0):
        """pick, at, most: see ResidualAttentionBlock; they act in the last block. skip: how many blocks are
        left out at the end."""
        blocks = self.resblocks[: max(len(self.resblocks) - skip, 0)]
        if not len(blocks):
            return x
        for block in blocks[:-1]:
            x = (
                checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn in it
                if self.checkpointing and self.training
                else block(x)
            )
        return blocks[-1](x, pick, at, most)


def take(among, x):
    """(B, N, W) to the (B, M, W) at these places, (B, M)."""
    return x.gather(1, among[:, :, None].expand(-1, -1, x.shape[2]))


class VisionTransformer(nn.Module):
    def __init__(
        self, grid, patch_size, stride_size, width, layers, heads, output_dim, activation="quick_gelu"
    ):
        """grid: (rows, columns) of patches. activation: of ACTIVATIONS."""
        super().__init__()
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + grid[0] * grid[1], width))
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))
        self.conv1 = nn.Conv2d(3, width, patch_size, stride_size, bias=False)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation=activation)
        self.ln_post = LayerNorm(width)

    def forward(self, images, class_only=False, attention=False, most=None, skip=0):
        """images: (B, 3, H, W), normalised. Returns every token (B, N, D), or (B, 1, D) with class_only; with
        attention also the class token's attention_row in the last block, with `most` of those that count
        most for it alone. skip: see Transformer."""
        x = self.conv1(images.to(self.conv1.weight.dtype))  # (B, width, rows, columns)
        x = x.flatten(2).transpose(1, 2)  # (B, N - 1, width)
        B = x.shape[0]  # not len(x), which ONNX export would fix
        class_embedding = self.class_embedding.to(x.dtype).expand(B, 1, -1)
        x = torch.cat([class_embedding, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.ln_pre(x)
        at = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if attention else None
        pick = (lambda x: x[:, :1]) if class_only else None
        x = self.transformer(x, pick, at, most, skip)
        x, row = x if attention else (x, None)
        x = self.ln_post(x) @ self.proj
        return (x, row) if attention else x


class CLIP(nn.Module):
    """Image and text encoder. `visual` is a VisionTransformer or a ModifiedResNet."""

    def __init__(
        self, visual, embed_dim, context_length, vocab_size, width, layers, heads, activation="quick_gelu"
    ):
        super().__init__()
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.visual = visual
        self.transformer = Transformer(width, layers, heads, causal=True, activation=activation)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln_final = LayerNorm(width)
        # CLIP's own start, for training from random weights; a checkpoint overwrites it
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.transformer.initialise(width)

    @property
    def dtype(self):
        return self.visual.conv1.weight.dtype

    def encode_image(self, images, class_only=False, **how):
        """(B, 3, H, W) to every token (B, N, D), or its first (B, 1, D); a ResNet gives one pooled (B, D).
        how: VisionTransformer's `attention`, `most` and `skip`."""
        return self.visual(images, class_only, **how)

    def encode_text(self, ids, at=None, skip=0, places=None):
        """(B, L) to every position (B, L, D); L may be shorter than the positions there are. With at (B,)
        also that position's attention_row in the last block. skip: see Transformer. places: (B, L), where in
        the sentence an id stands, if not 0 … L - 1."""
        return self.encode_words(self.token_embedding(ids), at, skip, places)

    def encode_words(self, x, at=None, skip=0, places=None):
        """encode_text after the look-up of words, which torch.compile is kept from: (B, L, width)."""
        positions = self.positional_embedding
        positions = positions[: x.shape[1]] if places is None else positions[places]
        x = x.to(self.dtype) + positions.to(self.dtype)
        x = self.transformer(x, at=at, skip=skip)
        x, row = x if at is not None else (x, None)
        x = self.ln_final(x) @ self.text_projection
        return x if at is None else (x, row)
