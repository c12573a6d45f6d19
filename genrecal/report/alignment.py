"""How student and teacher are aligned, from a run's snapshots: similarity matrices and t-SNE (paper, Figures 6 and 7)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genrecal.errors import UsageError
from genrecal.report.chart import HEIGHT, WIDTH
from genrecal.report.run_figures import RunFigures, figure, percent
from genrecal.run_folder import PAIRINGS, POOLINGS, Snapshot

CELL, MARGIN = 30, 30  # of a matrix's picture: a cell's side, and room for its numbers
NEIGHBOURS = 10
POOLING_WORDS = {"question": "question tokens", "answer": "answer tokens", "all": "all tokens"}
PAIRING_WORDS = {
    "own": "The student's own question and answer against the teacher's",
    "splice": "The student's question with the teacher's answer (what is trained) against the teacher's",
}
GROUPS = ("student before", "student after", "teacher before", "teacher after")  # the Recalibrator


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix of cosines, drawn. `cells`: rows of (x, y, share of the scale from 0 to 1, cosine)."""

    title: str
    alt: str
    diagonal: float
    off_diagonal: float
    cells: tuple[tuple[tuple[int, int, float, float], ...], ...]

    @property
    def side(self) -> int:
        return 2 * MARGIN + CELL * len(self.cells)


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """A t-SNE, drawn: of each group its places (x, y, whether an answer token)."""

    title: str
    alt: str
    groups: dict[str, tuple[tuple[float, float, bool], ...]]


def diagonal_means(cosines: np.ndarray) -> tuple[float, float]:
    """Mean of the diagonal and of the rest of a square matrix `[S, S]`."""
    size = len(cosines)
    on = float(np.trace(cosines, dtype=np.float64)) / size
    return on, (float(cosines.sum(dtype=np.float64)) - on * size) / (size * size - size)


def moment_words(snapshot: Snapshot) -> str:
    return f"{snapshot.moment} of stage {snapshot.stage}"


def similarity_rows(runs: Sequence[RunFigures]) -> list[list[str]]:
    """Run, regularisation's weight, moment, what is compared, tokens, diagonal, off-diagonal, their difference."""
    rows = []
    for run in runs:
        for snapshot in run.snapshots:
            for pairing in PAIRINGS:
                for pooling in POOLINGS:
                    if (cosines := snapshot.similarity.get(f"{pairing}.{pooling}")) is not None:
                        on, off = diagonal_means(cosines)
                        rows.append([
                            run.name, str(run.setting("loss.reg_weight")), moment_words(snapshot),
                            {"own": "student's answer", "splice": "teacher's answer"}[pairing], POOLING_WORDS[pooling],
                            f"{on:.3f}", f"{off:.3f}", f"{on - off:+.3f}",
                        ])  # fmt: skip
    return rows


def matrices(runs: Sequence[RunFigures], pairing: str, pooling: str) -> tuple[list[Matrix], float, float]:
    """Of each run at each moment, on one scale, whose ends are the least and the largest cosine of them all."""
    found = [
        (run, snapshot, snapshot.similarity[f"{pairing}.{pooling}"])
        for run in runs
        for snapshot in run.snapshots
        if f"{pairing}.{pooling}" in snapshot.similarity
    ]
    finite = [cosines[np.isfinite(cosines)] for *_, cosines in found]
    values = np.concatenate(finite) if finite else np.empty(0)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    drawn = []
    for run, snapshot, cosines in found:
        on, off = diagonal_means(cosines)
        title = f"{run.name}, {moment_words(snapshot)}" if len(runs) > 1 else moment_words(snapshot)
        drawn.append(
            Matrix(
                title=title,
                alt=f"{title}, {POOLING_WORDS[pooling]}: cosines of {len(cosines)} samples. Mean of the diagonal {on:.3f}, "
                f"of the rest {off:.3f}.",
                diagonal=on,
                off_diagonal=off,
                cells=tuple(
                    tuple(_cell(i, j, float(cosine), low, high) for j, cosine in enumerate(row))
                    for i, row in enumerate(cosines)
                ),
            )
        )
    return drawn, low, high


def _cell(row: int, column: int, cosine: float, low: float, high: float) -> tuple[int, int, float, float]:
    share = (cosine - low) / (high - low) if math.isfinite(cosine) and high > low else 0.0
    return MARGIN + column * CELL, MARGIN + row * CELL, round(share, 3), cosine


# -------------------------------------------------------------------------------------------------------------------- t-SNE


def scatter(snapshot: Snapshot) -> Scatter:
    """Tokens of all four groups in two dimensions, the same every time. Raises UsageError without scikit-learn."""
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
    return Scatter(
        title=moment_words(snapshot),
        alt=f"t-SNE of {len(states)} tokens, {moment_words(snapshot)}. Nearest to the student's tokens after the Recalibrator "
        f"are the {' and the '.join(f'{name} it for {share:.0%}' for name, share in shares.items())}.",
        groups={
            group: tuple(
                (float(x), float(y), bool(is_answer))
                for (x, y), is_answer in zip(piece, snapshot.token_is_answer[group.split()[0]], strict=True)
            )
            for group, piece in zip(GROUPS, pieces, strict=True)
        },
    )


def neighbour_shares(snapshot: Snapshot) -> dict[str, dict[str, float]]:
    """Of each group: among the ten nearest tokens of other groups, the share that each other group has.

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
    rows = []
    for run in runs:
        for snapshot in run.snapshots:
            if snapshot.tokens:
                for group, shares in neighbour_shares(snapshot).items():
                    cells = ["-" if name == group else percent(shares[name]) for name in GROUPS]
                    rows.append([run.name, moment_words(snapshot), group, *cells])
    return rows


def own_rows(runs: Sequence[RunFigures]) -> list[list[str]]:
    """Run, moment, whose, its own cross-entropy over all, first and later answer tokens, and the samples measured."""
    return [
        [run.name, moment_words(snapshot), who, *(figure(parts.get(part, math.nan)) for part in ("", "_first", "_later")),
         str(snapshot.samples)]
        for run in runs
        for snapshot in run.snapshots
        for who, parts in snapshot.own.items()
    ]  # fmt: skip
