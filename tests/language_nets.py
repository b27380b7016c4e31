"""A small language model for tests: one block of causal attention with named projections."""

import torch
from torch import nn


class TinyLM(nn.Module):
    """Logits (B, T, V); positions from the mask, so that padding on either side changes nothing."""

    def __init__(self, vocabulary=11, width=8, heads=2, seed=0):
        super().__init__()
        self.heads = heads
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, width)
            self.places = nn.Embedding(64, width)
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
            self.norm = nn.LayerNorm(width)
            self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        x = self.embedding(input_ids) + self.places(places)
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() & mask.bool()[:, None, None]
        weights = scores.masked_fill(~seen, -1e4).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, width)
        return self.lm_head(self.norm(x + self.o_proj(mixed)))


def make_tokens(batch=3, length=9, vocabulary=11, seed=0, generated=3):
    """Prompts padded on the left by 0, 1, 2, ... tokens, whose last tokens the net wrote."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    attention, new = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row in range(batch):
        attention[row, : row % 4] = 0
    new[:, length - generated :] = generated > 0
    return {"input_ids": ids, "attention_mask": attention, **({"generated": new} if generated else {})}
