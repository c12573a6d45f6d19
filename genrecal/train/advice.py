"""What to change when training stops: settings as `--set NAME=VALUE`, with which the same command resumes.

Every message that advises a setting of a begun run is made here; tests/train/test_advice.py follows each of them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from genrecal.errors import DamageError, GenrecalError, TrainingError
from genrecal.evaluate.evaluate import is_out_of_memory
from genrecal.train.config import EvaluateConfig, TrainConfig
from genrecal.vlm.loading import first_line

RESUME = "run the same command with {} to resume"


def smaller_batch(stage: int, config: TrainConfig) -> list[str]:
    """A smaller micro-batch of the same global batch, as one option; none below one sample."""
    size, accumulation = config.stage(stage).batch_size, config.stage(stage).accumulation
    smaller = next((d for d in range(size // 2, 0, -1) if size % d == 0), 0)
    if not smaller:
        return []
    return [f"--set stage{stage}.batch_size={smaller} --set stage{stage}.accumulation={accumulation * size // smaller}"]


@contextmanager
def explain_failures(stage: int, config: TrainConfig, *, longest: int = 0) -> Iterator[None]:
    """Turn an allocation that failed, on a GPU or a CPU, and a loader process that died, into one line that says what to do.

    torch raises for a dead loader process from a signal's handler, anywhere in a step.

    Args:
        longest: tokens of the longest conversation that was computed on, if known.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, GenrecalError):
            raise
        if "DataLoader worker" in str(error):
            raise explain_loading(loader_died(error), stage, config) from None
        if not is_out_of_memory(error):
            raise
        ways = smaller_batch(stage, config)
        if not config.gradient_checkpointing:
            ways.append("--set gradient_checkpointing=true")
        if config.loss.chunk_rows != 1:
            ways.append(f"--set loss.chunk_rows={config.loss.chunk_rows // 2 or 64}")
        if longest > 1:
            ways.append(f"--set max_tokens={longest * 3 // 4} (leaves longer conversations out)")
        if config.engine != "zero3":
            ways.append(f"--set engine={'zero3' if config.engine == 'zero2' else 'zero2'} (on several GPUs)")
        if config.engine.startswith("zero") and not config.offload:
            ways.append("--set offload=true")
        raise TrainingError(
            f"stage {stage}: out of memory: {first_line(error)}; {RESUME.format('one or more of ' + ', '.join(ways))}; "
            "`genrecal train --dry-run` forecasts the memory"
        ) from None


def explain_loading(error: GenrecalError, stage: int, config: TrainConfig) -> GenrecalError:
    """What stopped the loading, with what to do about it."""
    if isinstance(error, DamageError):
        return DamageError(f"{error}. To leave damaged samples out, {RESUME.format('--set data.on_damage=skip')}")
    if isinstance(error, LoaderError):
        ways = ", or ".join(["--set data.workers=0", *smaller_batch(stage, config)])
        return TrainingError(f"stage {stage}: {error}; {RESUME.format(ways)}")
    return error


class LoaderError(TrainingError):
    """Processes that load samples failed, which the training process alone might not have."""


def loader_died(error: Exception) -> LoaderError:
    """A loader process that ended by itself: by the kernel, most often."""
    return LoaderError(
        f"a loader process died ({first_line(error)}); the machine's memory or its shared memory (/dev/shm) may be full"
    )


def too_many_left_out(
    stage: int, config: TrainConfig, *, skipped: int, damaged: int, seen: int, total: int, examples: Sequence[str]
) -> TrainingError:
    """More samples than `data.max_skip` were left out.

    Args:
        seen: samples of the stage up to here; total: of the whole stage. examples: why some were left out.
    """
    allowed = min(1.0, math.ceil(150 * (skipped + damaged) / max(seen, 1)) / 100)
    return TrainingError(
        f"stage {stage}: the student cannot take {skipped} of {total} samples, and {damaged} are damaged, over the limit of "
        f"{config.data.max_skip:.2%} (data.max_skip): {'; '.join(examples[:3])}. If they may be left out, "
        f"{RESUME.format(f'--set data.max_skip={allowed}')}"
    )


def not_finite(what: str, value: float, keys: Sequence[str], dtype: torch.dtype) -> TrainingError:
    """A loss or gradient that is no number."""
    return TrainingError(
        f"the {what} is {value} on samples {', '.join(keys)}; nothing was updated. Look at these samples"
        + (f"; for more precision, {RESUME.format('--set precision=float32')}" if dtype != torch.float32 else "")
        + "; a lower learning rate makes another run, in another --out"
    )


def evaluation_ways(config: EvaluateConfig) -> str:
    """What takes less memory where the student is evaluated while it is trained."""
    ways = [f"--set evaluate.batch_size={config.batch_size // 2}"] if config.batch_size > 1 else []
    ways += [f"--set evaluate.max_new_tokens={config.max_new_tokens // 2 or 64}"] if config.max_new_tokens != 1 else []
    ways.append("--set evaluate.data=[] (`genrecal evaluate` asks an exported stage)")
    return RESUME.format(", or ".join(ways))


@contextmanager
def explain_disk(path: Path, what: str) -> Iterator[None]:
    """Turn a file of the run that cannot be written into one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: the {what} cannot be written: {first_line(error)}; make room (or let it be written) and run the same "
            "command again to resume"
        ) from None
