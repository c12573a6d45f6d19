"""K draws per row from the teacher's own distribution (the sampled targets), and its exact entropy.

The estimate that they are for is unbiased (Random Sampling Knowledge Distillation, arXiv 2503.16870). The drawing rule is
part of the format: docs/shard-format.md, "Sampled targets".

Letters: R rows of a sample, r rows of a chunk, V head rows, K draws a row.
"""

import numpy as np
import torch
import xxhash

MAX_DRAWS = 2**16 - 1  # a count is uint16, and may be K


def uniforms(key: str, num_rows: int, draws: int) -> np.ndarray:
    """The random numbers of one sample's answer rows, float64 `[R, K]` in [0, 1).

    Row i's are numbers i K to i K + K - 1 of the Philox stream that the sample's key begins, so they depend on nothing but
    the key and the row: not on the batch, the shard or the worker.
    """
    raw = np.random.Philox(key=xxhash.xxh3_128_intdigest(key.encode())).random_raw(num_rows * draws)
    return (raw >> np.uint64(11)).astype(np.float64).reshape(num_rows, draws) * 2.0**-53


def draw(logits: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws with replacement from softmax(logits), by the inverse of its distribution function, and its entropy.

    Both in float64: in float32 the running sum over a large vocabulary would lose the small probabilities.

    Args:
        logits: float32 `[r, V]`.
        numbers: float64 `[r, K]` in [0, 1); a number u gives the first id whose running sum of probabilities is over u.

    Returns:
        ids int64 `[r, K]`, in the order of the numbers, and entropy float64 `[r]`, nats.
    """
    log_p = logits.double()
    log_p -= log_p.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    # A log-probability of -inf has p = 0 and adds nothing.
    entropy = -torch.linalg.vecdot(p, log_p.clamp_min_(torch.finfo(torch.float32).min))
    running = torch.cumsum(p, -1, out=p)
    # Rounding may leave the whole sum a little off 1; the clamp is for a number that times it rounds to it.
    ids = torch.searchsorted(running, numbers * running[:, -1:], right=True).clamp_max_(logits.shape[-1] - 1)
    return ids, entropy.clamp_min_(0)


def count_draws(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's distinct ids, rising, and how often each was drawn; id 0 with count 0 fills the row up.

    Args:
        ids: integers `[R, K]`.

    Returns:
        int32 `[R, K]` and uint16 `[R, K]`; a row of counts adds up to K.
    """
    ordered = np.sort(ids, axis=1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = np.cumsum(new, axis=1) - 1  # of each draw's id among the distinct ones of its row
    rows = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    distinct, counts = np.zeros(ids.shape, np.int32), np.zeros(ids.shape, np.uint16)
    distinct[rows[new], place[new]] = ordered[new]
    np.add.at(counts, (rows, place), 1)
    return distinct, counts
