"""Cross-entropy of chosen rows against an LM head, in tiles of (tokens, vocabulary), without autograd.

The obvious way projects every row onto the vocabulary and keeps the logits and their softmax for the backward. Here a
forward visits the logits tile by tile and keeps one number per row, the log-sum-exp; a backward computes every tile
again and turns it into its gradient where it lies. The peak is one tile (two in low precision), whatever the number of
rows and the vocabulary. Where the factors of the losses are known before, and a tile holds whole rows of the
vocabulary, `loss_and_gradient_rows` projects once: three matrix products instead of four.

Shapes: R rows of the hidden states, N chosen rows, H hidden size, V vocabulary, c x v one tile.
"""

import torch

_COLUMNS = 4096  # of the vocabulary, cast to another type at once where the tile holds all of it


def refuse_second_derivative() -> None:
    """For a `backward` that is not differentiable: torch's `once_differentiable` gives a gradient penalty constants.

    Raises:
        RuntimeError: under `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a loss computed in chunks has no second derivative: it would lack what goes through the softmax. Take "
            "it from the model's own logits."
        )


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    is_cast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64  # as PyTorch's own operators
    return torch.get_autocast_dtype(device) if is_cast else hidden.dtype


def _chunks(length: int, size: int):
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _in_tile(targets: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in a tile of these columns, (c, 1), and whether it lies there, (c,)."""
    local = targets - columns.start
    width = columns.stop - columns.start
    return local.clamp(0, width - 1).unsqueeze(-1), (local >= 0) & (local < width)


def forward_rows(hidden, index, weight, targets, tile: tuple[int, int], dtype: torch.dtype):
    """Losses and log-sum-exps of the rows `hidden[index]`, each (N,). Equal to

    ```python
    logits = hidden[index] @ weight.T
    log_z = logits.logsumexp(-1)
    losses = log_z - logits.gather(-1, targets[:, None])[:, 0]
    ```

    Args:
        hidden: (R, H)
        index: (N,), rows of `hidden`.
        weight: (V, H)
        targets: (N,), in the vocabulary.
        tile: tokens and vocabulary entries projected at once.
        dtype: type of the projection.
    """
    stats = sum_dtype(dtype)
    log_z = torch.empty(index.shape[0], dtype=stats, device=hidden.device)
    chosen = torch.zeros_like(log_z)  # logit of the target
    for rows in _chunks(index.shape[0], tile[0]):
        chunk = hidden[index[rows]].to(dtype)  # (c, H)
        largest = torch.full_like(log_z[rows], -torch.inf)
        total = torch.zeros_like(largest)
        for columns in _chunks(weight.shape[0], tile[1]):
            logits = (chunk @ weight[columns].to(dtype).t()).to(stats)  # (c, v)
            column, inside = _in_tile(targets[rows], columns)
            chosen[rows] += torch.where(inside, logits.gather(-1, column).squeeze(-1), 0)
            before, largest = largest, torch.maximum(largest, logits.amax(-1))
            total *= (before - largest).exp_()
            total += logits.sub_(largest.unsqueeze(-1)).exp_().sum(-1)
            del logits  # or it would be held while the next tile is made
        log_z[rows] = largest + total.log_()
    return log_z - chosen, log_z


def backward_rows(
    hidden, index, weight, targets, log_z, grad_losses, grad_hidden, grad_weight, tile: tuple[int, int], dtype
) -> None:
    """Adds the gradients of `(losses * grad_losses).sum()` to `grad_hidden` (R, H) and `grad_weight` (V, H).

    Either may be None. Products are summed in the type of sums, so `grad_weight` has to be of it; `grad_hidden` too
    where a row gets more than this. Rows whose gradient is zero (tokens of weight 0) are not projected again. Every
    row of `hidden` may be in `index` once.
    """
    used = grad_losses.nonzero().squeeze(-1)
    if used.shape[0] < index.shape[0]:
        index, targets, log_z, grad_losses = (x[used] for x in (index, targets, log_z, grad_losses))
    del used  # or it would be held beside every tile
    stats = sum_dtype(dtype)
    grad_losses = grad_losses.to(stats)
    for rows in _chunks(index.shape[0], tile[0]):
        chunk = hidden[index[rows]].to(dtype)  # (c, H)
        scale = grad_losses[rows].unsqueeze(-1)  # (c, 1)
        minus_log_z = -log_z[rows].unsqueeze(-1)
        grad_chunk = None if grad_hidden is None else torch.zeros(chunk.shape, dtype=stats, device=chunk.device)
        for columns in _chunks(weight.shape[0], tile[1]):
            weight_tile = weight[columns].to(dtype)  # (v, H)
            column, inside = _in_tile(targets[rows], columns)
            # d loss / d logit_j = p_j - 1[j = target]
            if dtype == stats:
                grad = torch.addmm(minus_log_z, chunk, weight_tile.t())
            else:
                grad = (chunk @ weight_tile.t()).to(stats).add_(minus_log_z)
            grad = grad.exp_().mul_(scale)
            grad.scatter_add_(-1, column, torch.where(inside, -grad_losses[rows], 0).unsqueeze(-1))
            if grad.is_cuda:
                grad = grad.to(dtype)  # for the tensor cores; a CPU multiplies in float32
            if grad_chunk is not None:
                _add_product(grad_chunk, grad, weight_tile)
            if grad_weight is not None:
                _add_product(grad_weight[columns], grad.t(), chunk)
            del grad
        if grad_chunk is not None:
            grad_hidden.index_add_(0, index[rows], grad_chunk.to(grad_hidden.dtype))


def loss_and_gradient_rows(
    hidden, index, weight, targets, grad_losses, grad_hidden, grad_weight, tile: tuple[int, int], dtype
) -> torch.Tensor:
    """`forward_rows` and `backward_rows` for factors `grad_losses` (N,) that are known; returns the losses (N,).

    A tile that holds the whole vocabulary is not computed again: its log-sum-exp is known as soon as it is there.
    """
    if tile[1] < weight.shape[0]:
        losses, log_z = forward_rows(hidden, index, weight, targets, tile, dtype)
        backward_rows(hidden, index, weight, targets, log_z, grad_losses, grad_hidden, grad_weight, tile, dtype)
        return losses
    stats = sum_dtype(dtype)
    losses = torch.empty(index.shape, dtype=stats, device=hidden.device)
    without = (grad_losses == 0).nonzero().squeeze(-1)
    losses[without], _ = forward_rows(hidden, index[without], weight, targets[without], tile, dtype)
    for some in grad_losses.nonzero().squeeze(-1).split(tile[0]):
        rows, column, scale = index[some], targets[some].unsqueeze(-1), grad_losses[some].to(stats).unsqueeze(-1)
        chunk = hidden[rows].to(dtype)  # (c, H)
        logits = torch.empty(chunk.shape[0], weight.shape[0], dtype=stats, device=chunk.device)  # (c, V)
        for columns in _chunks(weight.shape[0], _COLUMNS):
            logits[:, columns] = chunk @ weight[columns].to(dtype).t()
        largest = logits.amax(-1, keepdim=True)
        losses[some] = (largest - logits.gather(-1, column)).squeeze(-1)
        total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
        losses[some] += total.log().squeeze(-1)
        # d loss / d logit_j = p_j - 1[j = target]
        grad = logits.mul_(scale / total).scatter_add_(-1, column, -scale)
        grad_chunk = None if grad_hidden is None else torch.zeros(chunk.shape, dtype=stats, device=chunk.device)
        for columns in _chunks(weight.shape[0], _COLUMNS):
            part = grad[:, columns].to(dtype) if grad.is_cuda else grad[:, columns]
            if grad_chunk is not None:
                _add_product(grad_chunk, part, weight[columns].to(dtype))
            if grad_weight is not None:
                _add_product(grad_weight[columns], part.t(), chunk)
        if grad_chunk is not None:
            grad_hidden.index_add_(0, rows, grad_chunk.to(grad_hidden.dtype))
        del logits, grad, part  # or they would be held while the next tile is made
    return losses


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b`, where no product is rounded to less than the type of `total`."""
    if a.is_cuda and a.dtype != total.dtype:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def argmax_rows(hidden, index, weight, tile: tuple[int, int], dtype) -> torch.Tensor:
    """`(hidden[index] @ weight.T).argmax(-1)`, (N,); 0 where no score is a number."""
    best = torch.zeros_like(index)
    for rows in _chunks(index.shape[0], tile[0]):
        chunk = hidden[index[rows]].to(dtype)
        value = torch.full(chunk.shape[:1], -torch.inf, dtype=dtype, device=hidden.device)
        for columns in _chunks(weight.shape[0], tile[1]):
            tile_value, tile_best = (chunk @ weight[columns].to(dtype).t()).max(-1)
            better = tile_value > value
            value = torch.where(better, tile_value, value)
            best[rows] = torch.where(better, tile_best + columns.start, best[rows])
    return best
