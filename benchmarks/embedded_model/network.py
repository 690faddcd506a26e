"""The Llama architecture as one plain function over a state dict, for fast training on a CPU.

Names, shapes and arithmetic are those of ``transformers.LlamaForCausalLM`` with tied embeddings, so a trained state
dict loads into it as it is.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def make_config(vocab: int, **changes: Any) -> Any:
    """``LlamaConfig`` of the embedded model; ``changes`` override fields."""
    from transformers import LlamaConfig

    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(fields | changes))


def init_weights(config: Any, seed: int, back: Sequence[int] | None = None) -> Weights:
    """Fresh parameters by their Hugging Face names; matrices are (out, in), random but for two head starts.

    The heads of the first layer look one, two, three and four tokens back, or as many as ``back`` says for each, and
    the heads of later layers copy what they attend to. Both are what training finds for itself on longer runs; given at
    the start, they spare most of the tokens that a model of this size spends before it retrieves anything.
    """
    g = torch.Generator().manual_seed(seed)
    c, m, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads, depth = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers

    def matrix(rows: int, cols: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, cols, generator=g) * (scale / math.sqrt(cols))

    embedding = torch.randn(config.vocab_size, c, generator=g) * 0.15
    embedding[:, 0] = 0.75  # a constant that the positional heads read
    weights = {"model.embed_tokens.weight": embedding}
    out = 1 / math.sqrt(2 * depth)
    for i in range(depth):
        at = f"model.layers.{i}."
        q, k, v = matrix(heads * d, c), matrix(kv_heads * d, c), matrix(kv_heads * d, c)
        o = matrix(c, heads * d, out)
        if i == 0:
            q, k = _look_back(config, back or range(1, heads + 1), constant=4.0)
            v = v[:d].repeat(kv_heads, 1)  # a word looks alike to all of them, however far back it stands
        else:
            o = out * v.view(kv_heads, d, c).repeat_interleave(heads // kv_heads, 0).flatten(0, 1).T.contiguous()
        weights |= {
            at + "input_layernorm.weight": torch.ones(c),
            at + "self_attn.q_proj.weight": q,
            at + "self_attn.k_proj.weight": k,
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": o,
            at + "post_attention_layernorm.weight": torch.ones(c),
            at + "mlp.gate_proj.weight": matrix(m, c),
            at + "mlp.up_proj.weight": matrix(m, c),
            at + "mlp.down_proj.weight": matrix(c, m, 0.5 * out),
        }
    weights["model.norm.weight"] = torch.ones(c)
    return weights


def _look_back(config: Any, back: Sequence[int], constant: float) -> tuple[Tensor, Tensor]:
    """Query and key matrices (out, C) whose head h attends ``back[h]`` tokens back, reading the constant in dimension
    0.

    With key (b, 0) and query b (cos nw, -sin nw) in each rotated pair of frequency w, the logit at a distance of t
    tokens is the sum of b² cos(w (t - n)) over the pairs, which peaks at t = n.
    """
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    half = d // 2
    w = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(half).float() / half)
    strength = torch.zeros(half)
    strength[:8] = torch.tensor([60.0, 20.0, 15.0, 15.0, 15.0, 15.0, 10.0, 10.0])[:half].sqrt() / constant
    q, k = torch.zeros(heads, d, config.hidden_size), torch.zeros(kv_heads, d, config.hidden_size)
    k[:, :half, 0] = strength
    for head, n in enumerate(back):
        q[head, :half, 0] = strength * torch.cos(w * n)
        q[head, half:, 0] = -strength * torch.sin(w * n)
    return q.flatten(0, 1), k.flatten(0, 1)


def rotary(config: Any, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, each (length, D)."""
    d = config.head_dim
    inverse = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
    angle = torch.outer(torch.arange(length).float(), inverse).repeat(1, 2)
    return angle.cos(), angle.sin()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def hidden_states(w: Weights, config: Any, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Final normed hidden states (B, T, C) of token ids (B, T); ``cos`` and ``sin`` are (T, D)."""
    return through(w, config, F.embedding(ids, w["model.embed_tokens.weight"]), cos, sin)


def through(w: Weights, config: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for embedded tokens ``x`` (B, T, C); ``cos`` and ``sin`` may also be (B, 1, T, D)."""
    batch, length, _ = x.shape
    d, eps, groups = config.head_dim, config.rms_norm_eps, config.num_attention_heads // config.num_key_value_heads

    def heads(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[name]).view(batch, length, -1, d).transpose(1, 2)

    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        h = _norm(x, w[at + "input_layernorm.weight"], eps)
        q = _rotate(heads(h, at + "self_attn.q_proj.weight"), cos, sin)
        k = _rotate(heads(h, at + "self_attn.k_proj.weight"), cos, sin).repeat_interleave(groups, 1)
        v = heads(h, at + "self_attn.v_proj.weight").repeat_interleave(groups, 1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(o.transpose(1, 2).reshape(batch, length, -1), w[at + "self_attn.o_proj.weight"])
        h = _norm(x, w[at + "post_attention_layernorm.weight"], eps)
        gate = F.silu(F.linear(h, w[at + "mlp.gate_proj.weight"])) * F.linear(h, w[at + "mlp.up_proj.weight"])
        x = x + F.linear(gate, w[at + "mlp.down_proj.weight"])
    return _norm(x, w["model.norm.weight"], eps)


def token_losses(w: Weights, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N,) and whether the best token is right (N,), for hidden states (N, C) and targets (N,)."""
    logits = F.linear(hidden, w["model.embed_tokens.weight"])
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets
