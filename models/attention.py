"""Attention of models in training on a CPU, where torch's own is slow.

Its fused kernel goes backward in bfloat16 three times as long as in float32, and it has no dropout: with dropout torch
takes the plain formula, keeps every probability and draws its mask a number at a time. Here the backward pass computes
the probabilities again, some heads of some rows at a time, by matrix products: scores in float32, all else in the
model's own type. What is kept is what the fused kernel keeps, and with dropout a byte of mask a probability. Of long
sequences the fused kernel skips what a causal mask hides, so those are left to it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import dropout

SCORES_AT_ONCE = 2**18  # numbers that stay in a core's cache
LONGEST = 256  # of a sequence: from 320 on the fused kernel is quicker in spite of all


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Do what F.scaled_dot_product_attention does, for [B, H, L, D]; query heads may share those of keys and values."""
    if key.shape[1] != query.shape[1]:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    if not _is_quicker(query, key, value, mask, dropout_p):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
    dtype = _dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        mask = mask.to(dtype)[(None,) * (4 - mask.ndim)].expand(-1, -1, query.shape[2], key.shape[2])
    keep, share = None, 1.0
    if dropout_p:
        keep, share = dropout.keep_mask(query.new_empty(*query.shape[:3], key.shape[2]), dropout_p)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, mask, keep, is_causal, scale, 1 / share)


def _is_quicker(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether the way of this module is quicker, and can be gone: strange shapes and layouts are torch's."""
    parts = (query, key, value)
    if query.device.type not in dropout.QUICK or not torch.is_grad_enabled() or not any(p.requires_grad for p in parts):
        return False
    scores = query.shape[2] * key.shape[2]
    gains = 0 < dropout_p < 1 or (_dtype(query) == torch.bfloat16 and dropout_p == 0 and scores <= LONGEST**2)
    plain = query.dtype in (torch.float32, torch.bfloat16) and len(query) == len(key) and scores > 0
    plain &= query.shape[-1] == value.shape[-1] and all(part.stride(-1) == 1 for part in parts)
    return gains and plain and not (mask is not None and mask.requires_grad)


def _dtype(query: Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


class _Attention(torch.autograd.Function):
    """softmax(scale Q K^T + mask) V, with dropout of the probabilities where `keep` says which stay."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        keep: Tensor | None,
        is_causal: bool,
        scale: float,
        factor: float,
    ) -> Tensor:
        """`factor` is that of what stays; `mask` [1 or B, 1 or H, Lq, Lk] is added."""
        ctx.is_causal, ctx.scale, ctx.factor = is_causal, scale, factor
        with torch.autocast(query.device.type, enabled=False):
            if keep is None:
                mixed, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
                )
            else:
                mixed, log_sum = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
                for at, scores in _scores(query, key, mask, is_causal, scale):
                    sums = scores.logsumexp(-1)
                    log_sum[at] = sums.masked_fill_(sums == -torch.inf, 0)  # nothing is seen: all will be exp(-inf)
                    kept = scores.sub_(log_sum[at].unsqueeze(-1)).exp_().mul_(keep[at]).mul_(factor)
                    mixed[at] = kept.to(value.dtype) @ value[at]
        ctx.save_for_backward(query, key, value, mask, keep, mixed, log_sum)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, keep, mixed, log_sum = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(part) for part in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            # the gradient of a softmax is p (g - sum of p g), and that sum is the product of output and gradient
            mean = (grad.float() * mixed.float()).sum(-1, keepdim=True)
            for at, scores in _scores(query, key, mask, ctx.is_causal, ctx.scale):
                p = scores.sub_(log_sum[at].unsqueeze(-1)).exp_()
                grad_p = (grad[at] @ value[at].mT).float()
                kept = p
                if keep is not None:
                    kept = (p * keep[at]).mul_(ctx.factor)
                    grad_p.mul_(keep[at]).mul_(ctx.factor)
                grad_value[at] = kept.to(grad.dtype).mT @ grad[at]
                grad_scores = p.mul_(grad_p.sub_(mean[at])).mul_(ctx.scale).to(query.dtype)
                grad_query[at] = grad_scores @ key[at]
                grad_key[at] = grad_scores.mT @ query[at]
        return grad_query, grad_key, grad_value, None, None, None, None, None


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield rows and heads, and their masked scores [rows, heads, Lq, Lk]: in float32, for they are exponents."""
    query, key = query.float() * scale, key.float()
    (num_rows, num_heads, length), keys = query.shape[:3], key.shape[2]
    one_head = length * keys
    heads_at_once = min(num_heads, max(1, SCORES_AT_ONCE // one_head))
    rows_at_once = max(1, SCORES_AT_ONCE // (num_heads * one_head))
    unseen = query.new_full((length, keys), -torch.inf).triu_(1) if is_causal else None
    mask = None if mask is None else mask.expand(num_rows, num_heads, -1, -1)
    for row in range(0, num_rows, rows_at_once):
        for head in range(0, num_heads, heads_at_once):
            at = slice(row, row + rows_at_once), slice(head, head + heads_at_once)
            scores = query[at] @ key[at].mT
            if mask is not None:
                scores += mask[at]
            if unseen is not None:
                scores += unseen
            yield at, scores


def attention_of_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention "sdpa" of Hugging Face models, by `attention` where that is quicker."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    special = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    special |= causal and query.shape[2] != key.shape[2]
    if special or not _is_quicker(query, key, value, attention_mask, dropout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    mixed = attention(query, key, value, attention_mask, is_causal=causal, scale=scaling, dropout_p=dropout)
    return mixed.transpose(1, 2).contiguous(), None
