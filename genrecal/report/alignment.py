"""How student and teacher are aligned, from a run's snapshots: similarity matrices and t-SNE (paper, Figures 6 and 7)."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from genrecal.errors import UsageError
from genrecal.report.chart import HEIGHT, WIDTH
from genrecal.report.run_figures import RunFigures, figure, percent
from genrecal.run_folder import PAIRINGS, POOLINGS, Snapshot

CELL, MARGIN = 30, 30  # of a matrix's drawing: a cell's side, and room for its numbers
NEIGHBOURS = 10
POOLING_WORDS = {"question": "question tokens", "answer": "answer tokens", "all": "all tokens"}
PAIRING_WORDS = {
    "own": "The student's own question and answer against the teacher's",
    "splice": "The student's question with the teacher's answer (what is trained) against the teacher's",
}
GROUPS = ("student before", "student after", "teacher before", "teacher after")  # the Recalibrator


def diagonal_means(cosines: np.ndarray) -> tuple[float, float]:
    """Mean of the diagonal and of the rest of a square matrix `[S, S]`."""
    diagonal = np.eye(len(cosines), dtype=bool)
    return float(cosines[diagonal].mean(dtype=np.float64)), float(cosines[~diagonal].mean(dtype=np.float64))


def moment_words(snapshot: Snapshot) -> str:
    return f"{snapshot.moment} of stage {snapshot.stage}"


def similarity_rows(runs: Sequence[RunFigures]) -> list[list[str]]:
    """Run, regularisation's weight, moment, what is compared, tokens, diagonal, off-diagonal, their difference."""
    found = [(run, snapshot) for run in runs for snapshot in run.snapshots if snapshot.similarity]
    rows = []
    for (run, snapshot), pairing, pooling in itertools.product(found, PAIRINGS, POOLINGS):
        on, off = diagonal_means(snapshot.similarity[f"{pairing}.{pooling}"])
        rows.append([
            run.name, str(run.setting("loss.reg_weight")), moment_words(snapshot),
            {"own": "student's answer", "splice": "teacher's answer"}[pairing], POOLING_WORDS[pooling],
            f"{on:.3f}", f"{off:.3f}", f"{on - off:+.3f}",
        ])  # fmt: skip
    return rows


def matrices(runs: Sequence[RunFigures], pairing: str, pooling: str) -> tuple[list[dict[str, Any]], float, float]:
    """Each run's matrices at each moment, drawn on one scale, and the scale's ends: the least and the largest cosine.

    A drawn matrix has a title, alt text, its side, the means of its diagonal and of the rest, and rows of cells: x, y, share
    of the scale from 0 to 1, cosine.
    """
    name = f"{pairing}.{pooling}"
    found = [(run, snapshot) for run in runs for snapshot in run.snapshots if name in snapshot.similarity]
    values = np.concatenate([np.empty(0), *(snapshot.similarity[name].ravel() for _, snapshot in found)])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    drawn = []
    for run, snapshot in found:
        cosines = snapshot.similarity[name]
        on, off = diagonal_means(cosines)
        shares = np.where(np.isfinite(cosines), (cosines - low) / (high - low or 1.0), 0.0).round(3)
        title = f"{run.name}, {moment_words(snapshot)}" if len(runs) > 1 else moment_words(snapshot)
        drawn.append({
            "title": title,
            "alt": f"{title}, {POOLING_WORDS[pooling]}: cosines of {len(cosines)} samples. Mean of the diagonal {on:.3f}, "
                   f"of the rest {off:.3f}.",
            "side": 2 * MARGIN + CELL * len(cosines),
            "diagonal": on,
            "off_diagonal": off,
            "cells": [
                [(MARGIN + j * CELL, MARGIN + i * CELL, float(shares[i, j]), float(cosine)) for j, cosine in enumerate(row)]
                for i, row in enumerate(cosines)
            ],
        })  # fmt: skip
    return drawn, low, high


# -------------------------------------------------------------------------------------------------------------------- t-SNE


def scatter(snapshot: Snapshot) -> dict[str, Any]:
    """Tokens of all four groups in two dimensions, the same every time: title, alt text, and by group the tokens' x, y and
    whether each is an answer token. Raises UsageError without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UsageError(
            'the report draws t-SNE with scikit-learn, which is not installed: pip install "genrecal[report]"'
        ) from None
    states = np.concatenate([snapshot.tokens[group] for group in GROUPS])
    perplexity = min(30.0, (len(states) - 1) / 3)
    fitted = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=0).fit_transform(states)
    low, span = fitted.min(0), np.maximum(np.ptp(fitted, axis=0), 1e-9)
    places = np.round(8 + (fitted - low) / span * (WIDTH - 16, HEIGHT - 16), 1)
    pieces = np.split(places, np.cumsum([len(snapshot.tokens[group]) for group in GROUPS])[:-1])
    shares = neighbour_shares(snapshot)["student after"]
    near = " and the ".join(f"{name} it for {share:.0%}" for name, share in shares.items())
    marks = snapshot.token_is_answer
    return {
        "title": moment_words(snapshot),
        "alt": f"t-SNE of {len(states)} tokens, {moment_words(snapshot)}. Nearest to the student's tokens after the "
        f"Recalibrator are the {near}.",
        "groups": {
            group: [
                (*map(float, place), bool(mark)) for place, mark in zip(piece, marks[group.split()[0]], strict=True)
            ]
            for group, piece in zip(GROUPS, pieces, strict=True)
        },
    }


def neighbour_shares(snapshot: Snapshot) -> dict[str, dict[str, float]]:
    """For each group: the share that each other group has among the ten nearest tokens of other groups.

    Distances are those of the states, not of the t-SNE.
    """
    result = {}
    for group in GROUPS:
        others = [name for name in GROUPS if name != group]
        points = np.concatenate([snapshot.tokens[name] for name in others]).astype(np.float64)
        owner = np.repeat(np.arange(len(others)), [len(snapshot.tokens[name]) for name in others])
        own = snapshot.tokens[group].astype(np.float64)
        distances = (own**2).sum(1)[:, None] - 2 * own @ points.T + (points**2).sum(1)[None]
        nearest = owner[np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS]]
        result[group] = {name: float((nearest == place).mean()) for place, name in enumerate(others)}
    return result


def neighbour_rows(runs: Sequence[RunFigures]) -> list[list[str]]:
    """Run, moment, group, and the shares of each group among its tokens' neighbours."""
    return [
        [run.name, moment_words(snapshot), group, *("-" if name == group else percent(shares[name]) for name in GROUPS)]
        for run in runs
        for snapshot in run.snapshots
        if snapshot.tokens
        for group, shares in neighbour_shares(snapshot).items()
    ]


def own_rows(runs: Sequence[RunFigures]) -> list[list[str]]:
    """Run, moment, whose, its own cross-entropy over all, first and later answer tokens, and the samples measured."""
    return [
        [run.name, moment_words(snapshot), who, *(figure(parts.get(part, math.nan)) for part in ("", "_first", "_later")),
         str(snapshot.samples)]
        for run in runs
        for snapshot in run.snapshots
        for who, parts in snapshot.own.items()
    ]  # fmt: skip
