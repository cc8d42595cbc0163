"""GPT-2 in plain PyTorch: the reference that the JAX model is held against. Read it from top to bottom.

Shapes: B batch, T time, D embedding, H heads, K head size, F MLP width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_core.batches import IGNORED
from gpt2_core.config import ModelConfig


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what precedes it (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            part.view(B, T, self.n_head, D // self.n_head).transpose(1, 2)
            for part in self.c_attn(x_BTD).split(D, dim=-1)
        )
        # softmax(q k^T / sqrt(K) + causal mask) v, in one fused kernel where there is one.
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        out_BTD = out_BHTK.transpose(1, 2).reshape(B, T, D)
        return self.resid_dropout(self.c_proj(out_BTD))


class MLP(nn.Module):
    """Two linear layers with GPT-2's tanh form of GELU between them (Hendrycks & Gimpel 2016)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        a_BTF = F.gelu(self.c_fc(x_BTD), approximate="tanh")
        return self.resid_dropout(self.c_proj(a_BTF))


class Block(nn.Module):
    """Attention, then MLP, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
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
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        # The head has no weight of its own: it shares wte.weight (see `forward`).
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
            elif "ln_" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with targets, the summed cross-entropy of those that aren't IGNORED instead."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.drop(self.wte(tokens_BT) + self.wpe(positions_T))
        for block in self.h:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.ln_f(x_BTD), self.wte.weight)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
