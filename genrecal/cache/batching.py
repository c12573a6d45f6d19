"""Which conversations run together."""

from collections.abc import Iterator


def batches_by_length(lengths: dict[int, int], batch_tokens: int) -> Iterator[list[int]]:
    """Ids of like length together, each batch at most `batch_tokens` with its padding (but at least one id).

    The longest come first: what does not fit into memory shows at once, and the batch that is not full is of short ones.
    """
    batch: list[int] = []
    longest = 0
    for number in sorted(lengths, key=lambda n: (-lengths[n], n)):
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        if not batch:
            longest = lengths[number]
        batch.append(number)
    if batch:
        yield batch
