"""Makes a dry run on the CPU take the kernels that PyTorch takes on CUDA, where the two keep different tensors alive.

Attention: on CUDA a flash or memory-efficient kernel saves its output and one statistic per row; a mask is expanded
and padded to a multiple of 8. Grouped heads in float32, which neither kernel takes, have their scores in full. Dropout
saves a boolean mask, on a CPU one of the activation's type (27 % of T5-small's peak). Which kernel a given card takes
is not known here; these are the defaults of PyTorch for its data types.
"""

import contextlib

import torch
import torch.nn.functional as F

aten = torch.ops.aten


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    flash = attn_mask is None and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256
    if enable_gqa and not flash:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    if flash:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            zero, low = torch.zeros((), dtype=query.dtype), torch.full((), float("-inf"), dtype=query.dtype)
            bias = torch.where(bias, zero, low)
        length = bias.shape[-1]
        if length % 8:
            bias = F.pad(bias, (0, 8 - length % 8))[..., :length]
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], length)
    with_gradient = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, with_gradient, dropout_p, is_causal, scale=scale
    )[0]


@contextlib.contextmanager
def like_cuda():
    """Within the block attention and dropout take the kernels of CUDA, on fake tensors."""
    attention, dropout = F.scaled_dot_product_attention, F.dropout

    def cuda_dropout(input, p=0.5, training=True, inplace=False):
        if training and 0 < p < 1:
            return torch.native_dropout(input, p, True)[0]
        return dropout(input, p, training, inplace)

    F.scaled_dot_product_attention, F.dropout = _attention, cuda_dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = attention, dropout
