"""A start for Rec-proj-post: the teacher's head reads from a projected state what the student's head reads from the state.

    argmin over W, b of  sum over shared tokens v of || (head_t(W h + b) - head_s(h))[v] ||^2       for every h

whose solution is W = pinv(U_t) U_s, with U_t and U_s the rows of the two heads that stand for the same bytes. KDFlow starts
the projector of its DSKD (arXiv 2406.17328) in this way. What an entry stands for is all that the tokenizers need to share.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from genrecal.errors import SampleError, UsageError
from genrecal.shards.head import FrozenHead
from genrecal.shards.mixture import Mixture
from genrecal.train.last_layer import Reads
from genrecal.train.recalibrator import Recalibrator
from genrecal.vlm.cached_teacher import teacher_renderer
from genrecal.vlm.loading import VLM
from genrecal.vlm.rendering import Renderer

CHUNK_ROWS = 8192  # of heads that are float64 at once
NORM_SAMPLES = 8  # that rec_norm is set from


@torch.no_grad()
def warm_start(recalibrator: Recalibrator, student: VLM, head: FrozenHead, cache: Mixture) -> None:
    """Set rec_proj_post by the heads' pseudo-inverse, and rec_norm so that it passes on what comes out of it.

    rec_norm brings every state to one length. Its gain and shift, the same for all channels, start as the mean deviation
    and the mean of rec_proj_post's output at the answers of the cache's first samples, so that a usual state comes through
    nearly unchanged. What untrained decoder blocks add to the student's states is not undone.

    Raises UsageError if the two vocabularies share fewer entries than the teacher's states have values.
    """
    teacher_ids, student_ids = shared_entries(teacher_renderer(cache.first), student.renderer)
    if len(teacher_ids) < head.weight.shape[1]:
        raise UsageError(
            f"recalibrator.init pseudo-inverse: the vocabularies of the teacher and of the student ({student.path}) share "
            f"{len(teacher_ids)} entries, expected at least the {head.weight.shape[1]} values of the teacher's states; "
            "set recalibrator.init to default"
        )
    weight, bias = head_map(head, student.frozen_head(), teacher_ids, student_ids)
    recalibrator.rec_proj_post.weight.copy_(weight)
    recalibrator.rec_proj_post.bias.copy_(bias)
    seen = answer_states(student, cache)
    projected = torch.cat([recalibrator.projected(states, Reads.of(rows, *states.shape[:2])) for states, rows in seen])
    recalibrator.rec_norm.weight.fill_(projected.float().std(-1, correction=0).mean())
    recalibrator.rec_norm.bias.fill_(projected.float().mean())


def shared_entries(teacher: Renderer, student: Renderer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the teacher's and of the student's that stand for the same bytes, int64 `[S]` each, by the teacher's.

    What closes an answer is the same on both sides, whatever it is called.
    """
    ids_t, ids_s = (_ids_by_bytes(renderer) for renderer in (teacher, student))
    pairs = {ids_t[entry]: ids_s[entry] for entry in ids_t.keys() & ids_s.keys()}
    pairs[teacher.marks.end_of_turn_id] = student.marks.end_of_turn_id
    shared = np.array(sorted(pairs.items()), np.int64).reshape(-1, 2)
    return shared[:, 0], shared[:, 1]


def _ids_by_bytes(renderer: Renderer) -> dict[bytes, int]:
    """Of several ids that stand for the same bytes the largest: the others are byte fallbacks, which stand before it."""
    bytes_of = renderer.byte_tokenizer.token_bytes
    return {bytes_of(token_id): token_id for token_id in sorted(renderer.tokenizer.get_vocab().values())}


def head_map(
    teacher: FrozenHead, student: FrozenHead, teacher_ids: np.ndarray, student_ids: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map, float32 `[D_t, D_s]` and `[D_t]`, after which the teacher's head gives the student's logits.

    In least squares over the shared tokens; scales of the logits are in it, softcaps are not. It solves the normal equations
    in float64, a part of the vocabulary at a time: `head_map_naive` is what it computes.

    Args:
        teacher_ids, student_ids: int64 `[S]`, rows of the two heads.
    """
    width = teacher.weight.shape[1]
    gram = teacher.weight.new_zeros(width, width, dtype=torch.float64)
    cross = teacher.weight.new_zeros(width, student.weight.shape[1] + 1, dtype=torch.float64)
    for start in range(0, len(teacher_ids), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        left, bias_t = _rows(teacher, teacher_ids[rows])
        right, bias_s = _rows(student, student_ids[rows])
        gram += left.T @ left
        cross += left.T @ torch.cat([right, (bias_s - bias_t)[:, None]], 1).to(left.device)
    solution = torch.linalg.pinv(gram, hermitian=True) @ cross
    return solution[:, :-1].float(), solution[:, -1].float()


def head_map_naive(
    teacher: FrozenHead, student: FrozenHead, teacher_ids: np.ndarray, student_ids: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `head_map` computes, with the pseudo-inverse of the shared rows written out."""
    left, bias_t = _rows(teacher, teacher_ids)
    right, bias_s = _rows(student, student_ids)
    inverse = torch.linalg.pinv(left)  # [D_t, S]
    return (inverse @ right).float(), (inverse @ (bias_s - bias_t)).float()


def _rows(head: FrozenHead, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a head and their biases with the scale of its logits, float64 `[S, D]` and `[S]`."""
    index = torch.from_numpy(ids).to(head.weight.device)
    scale = head.transform.scale / head.transform.divisor
    weight = head.weight[index].double() * scale
    bias = weight.new_zeros(len(ids)) if head.bias is None else head.bias[index].double() * scale
    return weight, bias


def answer_states(student: VLM, cache: Mixture) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of the cache's first samples that the student can take, its states float32 `[1, L, D_s]`, and the positions of them
    that predict an answer, int64 `[n]`."""
    found = 0
    for index in range(len(cache)):
        with contextlib.suppress(SampleError):
            encoded = student.renderer.encode(cache[index].sample)
            states = student.hidden(student.renderer.collate([encoded])).float()
            rows = [np.arange(start - 1, end - 1) for start, end, is_answer in encoded.segments() if is_answer]
            yield states, torch.from_numpy(np.concatenate(rows)).to(states.device)
            found += 1
        if found == NORM_SAMPLES:
            return
