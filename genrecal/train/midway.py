"""Evaluation of the student during training, in place: no copy of it, and training is not affected."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from genrecal.errors import DataError, UsageError
from genrecal.evaluate.evaluate import Evaluation, Prediction, ask, evaluation_of, explain_oom
from genrecal.evaluate.scores import check_metric
from genrecal.samples import BadRecord, FieldMap, SampleSet, open_samples
from genrecal.train.advice import evaluation_ways
from genrecal.train.config import EvaluateConfig, TrainConfig
from genrecal.train.ranks import Ranks
from genrecal.vlm.loading import VLM


class Midway:
    """What the student is asked, and when.

    A stage is evaluated each time `every` of its steps are done. Stage 1 leaves the student as it is, so it is asked once,
    before the first step: the score to compare with.

    Args:
        samples: opened data files.
    """

    def __init__(self, config: EvaluateConfig, samples: SampleSet):
        self.config, self.samples = config, samples

    @classmethod
    def of(cls, config: TrainConfig) -> "Midway | None":
        """None where no data are named. Raises UsageError or DataError for data, a metric or an engine that cannot serve."""
        settings = config.evaluate
        if not settings.data:
            return None
        if config.engine == "zero3":
            raise UsageError(
                "evaluate.data with engine zero3: a student whose weights lie on several GPUs cannot answer; set engine to "
                "zero2, or leave evaluate.data out and use `genrecal evaluate` on an exported stage"
            )
        check_metric(settings.metric, "evaluate.metric")
        samples = open_samples(
            list(settings.data),
            image_root=settings.image_root or None,
            limit=settings.limit or None,
            fields=FieldMap.parse(settings.fields, settings.roles),
        )
        first = samples[0]
        if isinstance(first, BadRecord) and all(isinstance(sample, BadRecord) for sample in samples):
            raise DataError(f"evaluate.data: no record can be asked: {first.location}: {first.reason}")
        return cls(settings, samples)

    def points(self, stage: int, num_steps: int) -> set[int]:
        """After how many steps the student is asked."""
        if stage == 1:
            return {0}
        times = math.ceil(1 / self.config.every - 1e-9)
        return {min(num_steps, max(1, round(number * self.config.every * num_steps))) for number in range(1, times + 1)}

    def ask(self, student: VLM, ranks: Ranks, *, compute_dtype: torch.dtype, seed: int) -> Evaluation:
        """The student's answers as it is now, LoRA included, in the precision that it is trained in.

        Every rank asks its share of the samples; all get the scores of all.

        Args:
            seed: of the sampling, where the student's generation config samples.
        """
        device, settings = student.device.type, self.config

        def own_share() -> list[tuple[list[Prediction], list[tuple[str, str]]]]:
            mine = range(ranks.rank, len(self.samples), ranks.size)
            with explain_oom(evaluation_ways(settings)):
                return [
                    ask(
                        student,
                        [self.samples[number] for number in mine[start : start + settings.batch_size]],
                        metric=settings.metric,
                        batch_size=settings.batch_size,
                        max_new_tokens=settings.max_new_tokens or None,
                    )
                    for start in range(0, len(mine), settings.batch_size)
                ]

        with (
            at_rest(student.model),
            torch.random.fork_rng(devices=[student.device] if device == "cuda" else []),
            torch.autocast(device, dtype=compute_dtype, enabled=compute_dtype != torch.float32),
        ):
            torch.manual_seed(seed)
            found = [batch for share in ranks.gather(ranks.together(own_share)) for batch in share]
        predictions = sorted((p for batch, _ in found for p in batch), key=lambda p: (p.key, p.turn))
        return ranks.together(
            lambda: evaluation_of(predictions, [record for _, left_out in found for record in left_out])
        )


@contextlib.contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards its modules, and what they keep of a call, are as they were.

    Families keep such things on their modules (the Qwen-VLs their `rope_deltas`), made in inference mode, which a later
    backward pass refuses.
    """
    kept = [
        (
            module,
            {name: value for name, value in vars(module).items() if not name.startswith("_")},
            dict(module.named_buffers(recurse=False)),
        )
        for module in model.modules()
    ]
    model.eval()
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            for name in [name for name in vars(module) if not name.startswith("_") and name not in attributes]:
                delattr(module, name)
            vars(module).update(attributes)  # its mode too
            for name, buffer in buffers.items():
                setattr(module, name, buffer)
