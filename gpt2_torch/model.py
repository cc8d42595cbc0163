"""GPT-2 in plain PyTorch: the reference that the JAX model is held against. Read it from top to bottom.

Shapes: B batch, T time, D embedding, H heads, K head size, F MLP width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_core.batches import IGNORED
from gpt2_core.config import ModelConfig


def make_norm(config: ModelConfig) -> nn.Module:
    """Layer norm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019) over the embedding."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)


def rotate(x_BHTK: Tensor, theta: float, pairs: str) -> Tensor:
    """Rotary position embeddings (Su et al. 2021): pair i of position t is rotated by t theta^(-2i/K)."""
    T, K = x_BHTK.shape[-2:]
    frequencies = theta ** (-torch.arange(0, K, 2, dtype=torch.float64, device=x_BHTK.device) / K)
    angles = torch.arange(T, dtype=torch.float64, device=x_BHTK.device)[:, None] * frequencies
    dtype = torch.promote_types(x_BHTK.dtype, torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if pairs == "half":
        a, b = x_BHTK.to(dtype).chunk(2, dim=-1)
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = x_BHTK.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return rotated.to(x_BHTK.dtype)


def alibi_slopes(n_head: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022, section 3): a geometric sequence from 2^(-8/n_head), which is its ratio too.

    For a number of heads that is no power of two, as in the paper's released code (`get_slopes` in
    github.com/ofirpress/attention_with_linear_biases): the slopes of the power of two below, then every other slope of
    twice that power.
    """
    if n_head & (n_head - 1) == 0:
        return [2.0 ** (-8 * i / n_head) for i in range(1, n_head + 1)]
    below = 1 << (n_head.bit_length() - 1)
    return alibi_slopes(below) + alibi_slopes(2 * below)[::2][: n_head - below]


def alibi_mask(q_BHTK: Tensor) -> Tensor:
    """What ALiBi adds to the scores (1, H, T, T): -slope (query position - key position), and -inf for later keys."""
    H, T = q_BHTK.shape[1:3]
    dtype = torch.promote_types(q_BHTK.dtype, torch.float32)
    slopes_H = torch.tensor(alibi_slopes(H), dtype=dtype, device=q_BHTK.device)
    positions_T = torch.arange(T, device=q_BHTK.device)
    distance_TT = positions_T[:, None] - positions_T
    bias_HTT = -slopes_H[:, None, None] * distance_TT
    return bias_HTT.masked_fill(distance_TT < 0, float("-inf"))[None].to(q_BHTK.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what precedes it (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Queries, keys and values side by side.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_size, eps=config.layer_norm_epsilon)
            self.k_norm = nn.RMSNorm(config.head_size, eps=config.layer_norm_epsilon)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        config = self.config
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            part.view(B, T, config.n_head, config.head_size).transpose(1, 2)
            for part in self.c_attn(x_BTD).split(D, dim=-1)
        )
        if config.qk_norm:
            q_BHTK, k_BHTK = self.q_norm(q_BHTK), self.k_norm(k_BHTK)
        if config.position == "rope":
            q_BHTK = rotate(q_BHTK, config.rope_theta, config.rope_pairs)
            k_BHTK = rotate(k_BHTK, config.rope_theta, config.rope_pairs)
        mask_1HTT = alibi_mask(q_BHTK) if config.position == "alibi" else None
        # softmax(q k^T / sqrt(K) + causal mask) v, in one fused kernel where there is one.
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHTK,
            v_BHTK,
            attn_mask=mask_1HTT,
            is_causal=mask_1HTT is None,
            dropout_p=config.dropout if self.training else 0.0,
        )
        out_BTD = out_BHTK.transpose(1, 2).reshape(B, T, D)
        return self.resid_dropout(self.c_proj(out_BTD))


class MLP(nn.Module):
    """Two linear layers with GELU between them (Hendrycks & Gimpel 2016), in GPT-2's tanh form or exact; or three,
    SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.c_fc = nn.Linear(config.n_embd, config.mlp_size, bias=config.bias)
        if config.mlp == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.mlp_size, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_size, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        a_BTF = self.c_fc(x_BTD)
        if self.kind == "swiglu":
            a_BTF = F.silu(self.c_gate(x_BTD)) * a_BTF
        else:
            a_BTF = F.gelu(a_BTF, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.resid_dropout(self.c_proj(a_BTF))


class Block(nn.Module):
    """Attention, then MLP, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT2(nn.Module):
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        # A tied head has no weight of its own: it uses wte.weight (see `forward`).
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal weights of standard deviation 0.02, zero biases; projections into the residual stream smaller by
        sqrt(2 n_layer), so that its variance doesn't grow with depth (Radford et al. 2019, section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layer) ** 0.5)
            elif "ln_" in name or "_norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with targets, the summed cross-entropy of those that aren't IGNORED instead."""
        x_BTD = self.wte(tokens_BT)
        if self.config.position == "learned":
            x_BTD = x_BTD + self.wpe(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        x_BTD = self.drop(x_BTD)
        for block in self.h:
            x_BTD = block(x_BTD)
        head = self.wte if self.config.tie_embeddings else self.lm_head
        logits_BTV = F.linear(self.ln_f(x_BTD), head.weight)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
