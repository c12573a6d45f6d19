"""The alignment of two tokenizers by its definition."""


def align_turn_naive(teacher, student):
    """What `genrecal.objectives.align.align_turn` computes, from the bytes of each token (none of an end of turn)."""
    pairs = {}
    for row_t in range(len(teacher)):
        for row_s in range(len(student)):
            prefix = b"".join(teacher[:row_t])
            if prefix == b"".join(student[:row_s]):
                pairs[prefix] = (row_t, row_s)  # a later pair of the same prefix takes the place of the earlier
    return list(pairs.values())
