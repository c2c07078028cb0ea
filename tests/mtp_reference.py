"""The obvious multi-token-prediction loss, written without any of ours: what the tests compare with."""

import torch
import torch.nn.functional as F


def naive_mtp_loss(logits, labels, mask, weights=None, reduction="mean"):
    """The seed's loop over the heads on logits (B, S, n, V); a prediction needs both of its positions to be real."""
    length, n_future = logits.shape[1:3]
    mask = torch.ones_like(labels) if mask is None else mask
    heads, everything = [], torch.zeros(logits.shape[:3], dtype=logits.dtype)
    for k in range(1, n_future + 1):
        if length <= k:
            continue
        head_labels = labels[:, k:]
        ce = F.cross_entropy(logits[:, :-k, k - 1].flatten(0, 1), head_labels.flatten(), reduction="none")
        valid = (mask[:, :-k] * mask[:, k:] * (head_labels != -100)).to(ce.dtype)
        loss = ce.view(valid.shape) * valid
        if weights is not None and weights.ndim == 1:
            loss = loss * weights[k - 1]
        elif weights is not None:
            loss = loss * (weights[:, k:] if weights.ndim == 2 else weights[:, :-k, k - 1])
        everything = everything + F.pad(loss, (0, k)).unsqueeze(-1) * F.one_hot(torch.tensor(k - 1), n_future)
        if valid.sum() > 0:
            heads.append(loss.sum() / valid.sum())
    if reduction == "none":
        return everything
    if reduction == "sum":
        return everything.sum()
    return sum(heads) / len(heads) if heads else logits.sum() * 0.0


def naive_logits(hidden, weight):
    """(B, S, n, V) from any of the forms that ours takes."""
    heads = len(weight) if isinstance(weight, (list, tuple)) else None
    if isinstance(hidden, torch.Tensor):
        hidden = hidden.unbind(2) if hidden.ndim == 4 else [hidden] * heads
    weights = weight if isinstance(weight, (list, tuple)) else [weight] * len(hidden)
    return torch.stack([h @ w.T for h, w in zip(hidden, weights)], dim=2)


def problem(dtype, batch=3, length=11, n_future=3, hidden_size=12, vocab=37, hidden="stacked", weight="one", seed=0):
    """(leaves, hidden, weight, labels): random tensors in one of the layouts."""
    torch.manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    hiddens = {
        "shared": lambda: [leaf(batch, length, hidden_size)],
        "stacked": lambda: [leaf(batch, length, n_future, hidden_size)],
        "list": lambda: [leaf(batch, length, hidden_size) for _ in range(n_future)],
    }[hidden]()
    weights = [leaf(vocab, hidden_size) for _ in range(1 if weight == "one" else n_future)]
    labels = torch.randint(0, vocab, (batch, length))
    return (
        [*hiddens, *weights],
        hiddens if hidden == "list" else hiddens[0],
        weights[0] if weight == "one" else weights,
        labels,
    )


def padding_mask(kind, labels):
    if kind == "none":
        return None
    mask = torch.ones_like(labels)
    for row, pad in enumerate([4, 0, labels.shape[1] - 2][: labels.shape[0]]):
        if pad:
            mask[row, :pad] = 0 if kind == "left" else 1
            if kind == "right":
                mask[row, -pad:] = 0
    return mask


def some_weights(kind, labels, n_future, dtype):
    torch.manual_seed(7)
    shapes = {"tokens": tuple(labels.shape), "heads": (n_future,), "predictions": (*labels.shape, n_future)}
    if kind == "none":
        return None
    weights = torch.rand(shapes[kind], dtype=dtype) * 2 - 0.3
    return weights * (torch.rand(shapes[kind]) > 0.3) if kind == "predictions" else weights
