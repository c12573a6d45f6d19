"""The dual space against the formulas of its paper, conversation by conversation."""

import math

import torch

from genrecal.objectives.dskd import DualSpace

D_S, D_T = 6, 10


def rows(counts, width, *, seed):
    """States, tokens and turns of rows, `counts` of them in each turn."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    turns = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return 5 * torch.randn(total, width, generator=generator), torch.randn(total, 2, width, generator=generator), turns


def of_one_turn(space, student, student_tokens, teacher, teacher_tokens):
    """The paper's equations over one answer."""
    keys = torch.cat([teacher_tokens[:, 0], teacher_tokens[:, 1]], 1)
    keys = keys / keys.std(correction=0)
    queries = space.to_query(torch.cat([student_tokens[:, 0], student_tokens[:, 1]], 1))
    scores = queries @ keys.T / math.sqrt(2 * D_T)
    targets = teacher_tokens[:, 1]
    values = teacher / teacher.std(correction=0) + targets / targets.std(correction=0)
    return scores.softmax(1) @ space.to_student(values), scores.T.softmax(1) @ space.to_teacher(student)


def test_each_turn_is_the_papers_equations_over_that_turn_alone():
    torch.manual_seed(0)
    space = DualSpace(D_S, D_T)
    mine, its = [3, 1, 5], [4, 2, 1]
    student, teacher = rows(mine, D_S, seed=1), rows(its, D_T, seed=2)
    t2s, s2t = space(*student, *teacher)
    assert (t2s.shape, s2t.shape) == ((9, D_S), (7, D_T))
    for turn in range(3):
        of_student, of_teacher = student[2] == turn, teacher[2] == turn
        expected = of_one_turn(
            space, student[0][of_student], student[1][of_student], teacher[0][of_teacher], teacher[1][of_teacher]
        )
        assert torch.allclose(t2s[of_student], expected[0], atol=1e-5)
        assert torch.allclose(s2t[of_teacher], expected[1], atol=1e-5)


def test_rows_reach_what_they_may_and_no_row_may_be_there():
    torch.manual_seed(0)
    space = DualSpace(D_S, D_T)
    student, teacher = rows([3, 2], D_S, seed=1), rows([2, 4], D_T, seed=2)
    states = student[0].requires_grad_()
    t2s, s2t = space(states, *student[1:], *teacher)
    s2t[:2].sum().backward()
    assert (states.grad[:3] != 0).all() and (states.grad[3:] == 0).all()
    none = (torch.zeros(0, D_S), torch.zeros(0, 2, D_S), torch.zeros(0, dtype=torch.int64))
    empty = space(*none, torch.zeros(0, D_T), torch.zeros(0, 2, D_T), none[2])
    space.zero_grad()
    (empty[0].sum() + empty[1].sum()).backward()
    assert all((parameter.grad == 0).all() for parameter in space.parameters())  # zeros, not none
