"""Cells that two tokenizers both fill, against a reference that goes through every token of both."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecal.demo.pipeline import ASSETS
from genrecal.objectives.cells import MIN_LONGER, MIN_MASS, Cells, TokenMap, cell_kl
from genrecal.shards.record import AnswerRows
from genrecal.vlm.loading import load_processor
from genrecal.vlm.rendering import Renderer

TEXTS = [
    "The total is 12.50 and the cash paid is 30.00.",
    "a  triangle, a square;\n three circles",
    "naïve 价格 👍 é",
    "yes",
    "seventeen seventeenth",
]
K = 16


@pytest.fixture(scope="module")
def renderers():
    return {name: Renderer(load_processor(ASSETS / name)) for name in ("teacher", "student")}


@pytest.fixture(scope="module")
def maps(renderers):
    def of(teacher, student):
        rows = len(renderers[student].tokenizer)
        same = teacher == student
        return TokenMap(renderers[teacher], renderers[student], student_rows=rows, same=same)

    pairs = [("teacher", "student"), ("student", "teacher"), ("teacher", "teacher")]
    return {pair: of(*pair) for pair in pairs}


def teacher_rows(renderer, text, seed, *, k=K, with_target=True):
    """Answer rows of one turn with made logits; the target is likely, or not among the k at all."""
    rng = np.random.default_rng(seed)
    tokens = renderer._tokenize_answer(text)
    n, vocabulary = len(tokens.ids), len(renderer.tokenizer)
    ids = np.stack([rng.permutation(vocabulary)[:k] for _ in range(n + 1)])
    logits = -np.sort(-rng.normal(size=(n + 1, k)) * 3, axis=1)
    if with_target:
        for row, target in enumerate(tokens.ids):
            ids[row] = np.append(target, ids[row][ids[row] != target])[:k]
    none = [-1]
    return tokens, AnswerRows(
        turn=np.zeros(n + 1, np.int32),
        position=np.arange(n + 1, dtype=np.int32),
        token_id=np.append(tokens.ids, none),
        states=np.zeros((n + 1, 1), np.float32),
        target_id=np.append(tokens.ids, none),
        target_start=np.append(tokens.starts, none),
        target_end=np.append(tokens.ends, none),
        target_logit=(logits[:, 0] if with_target else logits[:, -1] - 1).astype(np.float32),
        topk_ids=ids.astype(np.int32),
        topk_logits=logits.astype(np.float32),
        logsumexp=(np.logaddexp.reduce(logits, axis=1) + 0.3).astype(np.float32),
    )


def naive_cells(teacher, student, rows, answer, text, head_rows):
    """{student row: ({student id: cell mass key}, masses, rest)} by the definition, token by token, in float64."""
    tt, ts = teacher.byte_tokenizer, student.byte_tokenizer
    special_t = {i for i, token in teacher.tokenizer.added_tokens_decoder.items() if token.special}
    special_s = {i for i, token in student.tokenizer.added_tokens_decoder.items() if token.special}

    def split(tokens, content):
        try:
            return tokens(content.decode()).ids.tolist()
        except UnicodeDecodeError:
            return None

    fallback = "<0x0A>" in student.tokenizer.get_vocab()
    written = {}
    for token_id in range(min(head_rows, len(student.tokenizer))):
        content = ts.token_bytes(token_id)
        parts = split(ts, content) if content else []
        if token_id not in special_s and content and (parts == [token_id] or (parts is None and not fallback)):
            written[token_id] = content
    of_bytes = {content: token_id for token_id, content in sorted(written.items(), reverse=True)}

    def begins(content, skip):
        left = content[skip:]
        try:
            whole = ts(content.decode())
            at = np.flatnonzero(whole.starts == skip)
            if len(at):
                return int(whole.ids[at[-1]])
        except UnicodeDecodeError:
            pass
        parts = split(ts, left)
        if parts is not None:
            return parts[0] if parts else None
        return next((of_bytes[left[:n]] for n in range(len(left), 0, -1) if left[:n] in of_bytes), None)

    found = {}
    teacher_ends = [0, *np.maximum.accumulate(rows.target_end[:-1])[:-1]]
    for row, b in enumerate([0, *np.maximum.accumulate(answer.ends)[:-1]]):
        j = max(i for i, end in enumerate(teacher_ends) if end <= b)
        u = text[teacher_ends[j] : b]
        p = dict(
            zip(rows.topk_ids[j].tolist(), np.exp(np.float64(rows.topk_logits[j] - rows.logsumexp[j])), strict=True)
        )
        p.setdefault(int(rows.target_id[j]), math.exp(np.float64(rows.target_log_prob[j])))
        masses, members, rest = {}, {}, (1 - sum(p.values())) if not u else 0.0
        joined = []
        for token, value in p.items():
            if token == teacher.marks.end_of_turn_id:
                if not u:
                    masses[student.marks.end_of_turn_id] = masses.get(student.marks.end_of_turn_id, 0) + value
                continue
            if token in special_t:
                rest += 0 if u else value
                continue
            content = tt.token_bytes(token)
            if not content.startswith(u):
                continue
            first = begins(content, len(u)) if len(content) > len(u) else None
            if first is None:
                rest += value
                continue
            masses[first] = masses.get(first, 0) + value
            joined.append((token, value, first, content))
        whole = sum(masses.values()) + rest
        if whole < MIN_MASS or not masses:
            continue
        for token, value, first, content in joined:
            for token_id, entry in written.items():
                longer = u + entry
                if value >= MIN_LONGER * whole and len(longer) > len(content) and longer.startswith(content):
                    parts = split(tt, longer)
                    if parts and len(parts) > 1 and parts[0] == token:
                        members[token_id] = first
        members |= {token_id: token_id for token_id in masses}
        found[row] = members, {cell: mass / whole for cell, mass in masses.items()}, rest / whole
    return found


def as_dicts(cells):
    found = {}
    for row in np.flatnonzero(cells.valid):
        mine = cells.pair_rows == row
        groups = {}
        for token, cell in zip(cells.pair_ids[mine], cells.pair_cells[mine], strict=True):
            groups.setdefault(int(cell), set()).add(int(token))
        masses = {frozenset(tokens): math.exp(cells.log_p[cell]) for cell, tokens in groups.items()}
        found[int(row)] = masses, math.exp(cells.log_rest[row])
    return found


@pytest.mark.parametrize("pair", [("teacher", "student"), ("student", "teacher")])
@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_cells_are_those_of_the_definition(renderers, maps, pair, text, with_target):
    teacher, student = (renderers[name] for name in pair)
    _, rows = teacher_rows(teacher, text, seed=len(text), with_target=with_target)
    answer = student._tokenize_answer(text)
    got = as_dicts(maps[pair].cells(rows, [answer], [text.encode()]))
    expected = naive_cells(teacher, student, rows, answer, text.encode(), len(student.tokenizer))
    assert got.keys() == expected.keys() and (len(got) == len(answer.ids) or not with_target)
    for row, (members, masses, rest) in expected.items():
        groups = {}
        for token, cell in members.items():
            groups.setdefault(cell, set()).add(token)
        assert got[row][0] == pytest.approx({frozenset(groups[cell]): mass for cell, mass in masses.items()}, rel=1e-5)
        assert got[row][1] == pytest.approx(rest, abs=1e-6)


def naive_kl(logits, cells):
    """By the definition, in float64, one row after another."""
    q, values = logits.double().softmax(-1), []
    for row in range(len(logits)):
        mine, total, listed = torch.nonzero(cells.cell_rows == row)[:, 0], 0.0, []
        for cell in mine.tolist():
            ids = cells.pair_ids[cells.pair_cells == cell]
            listed += ids.tolist()
            p = cells.log_p[cell].double().exp()
            total = total + p * (p.log() - q[row, ids].sum().log())
        rest = [i for i in range(logits.shape[1]) if i not in listed]
        if rest:
            p = cells.log_rest[row].double().exp()
            total = total + p * (p.log() - q[row, rest].sum().log())
        values.append(total if cells.valid[row] else q[row].sum() * 0)
    return torch.stack(values)


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40),
    seed=st.integers(0, 999),
)
def test_the_kl_is_that_of_the_definition_in_value_and_gradient(renderers, maps, text, seed):
    teacher, student = renderers["teacher"], renderers["student"]
    _, rows = teacher_rows(teacher, text, seed)
    cells = Cells.joined([maps["teacher", "student"].cells(rows, [student._tokenize_answer(text)], [text.encode()])])
    assert (
        torch.zeros(len(cells.valid))
        .index_add(0, cells.cell_rows, cells.log_p.exp())[cells.valid]
        .add(cells.log_rest.exp()[cells.valid])
        .allclose(torch.tensor(1.0))
    )
    logits = torch.randn(len(cells.valid), len(student.tokenizer), generator=torch.Generator().manual_seed(seed)) * 3
    ours, expected = (logits.double().requires_grad_() for _ in range(2))
    values = cell_kl(ours, cells)
    wanted = naive_kl(expected, cells)
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-6)
    assert (values > -1e-6).all()
    values.sum().backward(), wanted.sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-6)
    half = len(cells.valid) // 2
    parts = [cell_kl(logits[a:b].double(), cells.rows(a, b)) for a, b in ((0, half), (half, len(logits)))]
    torch.testing.assert_close(torch.cat(parts), values.detach())


def test_the_gradient_is_right_where_all_ids_are_in_cells():
    cells = Cells(
        pair_ids=torch.tensor([0, 1, 2, 3, 1]), pair_cells=torch.tensor([0, 0, 1, 1, 2]),
        pair_rows=torch.tensor([0, 0, 0, 0, 1]), cell_rows=torch.tensor([0, 0, 1]),
        log_p=torch.tensor([0.3, 0.7, 0.6]).log(), log_rest=torch.tensor([1e-38, 0.4]).log(),
        valid=torch.tensor([True, True]), pair_starts=(0, 4, 5), cell_starts=(0, 2, 3),
    )  # fmt: skip
    logits = torch.tensor([[0.1, 2.0, -80.0, 0.4], [0.5, -90.0, 0.2, 0.3]], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(cell_kl(logits, cells), naive_kl(logits, cells), rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: cell_kl(x, cells), (logits,))


def test_one_tokenizer_gives_the_plain_kl_of_the_top_k(renderers, maps):
    """Every position lines up, every token is its own cell; teacher = student gives 0 where nothing is outside the k."""
    teacher = renderers["teacher"]
    vocabulary, text = len(teacher.tokenizer), TEXTS[0]
    tokens, rows = teacher_rows(teacher, text, seed=1, k=vocabulary)
    object.__setattr__(
        rows, "logsumexp", np.logaddexp.reduce(rows.topk_logits.astype(np.float64), axis=1).astype(np.float32)
    )
    cells = Cells.joined([maps["teacher", "teacher"].cells(rows, [tokens], [text.encode()])])
    assert cells.valid.all()
    log_p = torch.zeros(len(tokens.ids), vocabulary).scatter_(
        1, torch.from_numpy(rows.topk_ids[:-1]).long(), torch.from_numpy(rows.topk_logits[:-1])
    )
    assert cell_kl(log_p, cells).abs().max() < 1e-5
    other = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(0))
    expected = F.kl_div(other.log_softmax(-1), log_p.log_softmax(-1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(cell_kl(other, cells), expected, rtol=1e-4, atol=1e-5)
