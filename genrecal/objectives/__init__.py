"""What a student may be trained on. `objective = "NAME"` in a run's settings picks one of OBJECTIVES.

An objective is a class, one file each: `genrecal.objectives.base.Objective` has the whole interface, `sft.py` is the
shortest example, and docs/howto/objective.md adds one step by step. In short, an objective says

- its stages, and whether it needs one tokenizer or the teacher's own answers (class attributes);
- `tier`, what it reads of the cache: nothing, targets, states or question states; `needs_head`, the teacher's LM head;
- `modules`, what it trains beside the student;
- `check` and `batch`: conversations in the student's tokens and cached records -> its own batch type;
- `terms`: the student's states and a batch -> `Term`s, each the losses of some rows, with what is logged of them.

The loop, the stages and the loader know no objective by name. To use one that is not in this package, set `objective` to
`module:Class`. docs/method.md has the equations.
"""

import importlib
from typing import Any

from genrecal.errors import UsageError
from genrecal.objectives.aligned import GenrecalAligned
from genrecal.objectives.base import Objective
from genrecal.objectives.byte_kl import ByteKl
from genrecal.objectives.dskd import Dskd
from genrecal.objectives.genrecal import Genrecal
from genrecal.objectives.same_vocabulary import Kl, ReverseKl, SkewedKl
from genrecal.objectives.sft import SeqKD, Sft
from genrecal.objectives.uld import Uld

OBJECTIVES: dict[str, type[Objective[Any]]] = {
    "genrecal": Genrecal,
    "genrecal-aligned": GenrecalAligned,
    "sft": Sft,
    "seqkd": SeqKD,
    "byte-kl": ByteKl,
    "kl": Kl,
    "reverse-kl": ReverseKl,
    "skewed-kl": SkewedKl,
    "uld": Uld,
    "dskd": Dskd,
}


def objective_named(name: str) -> type[Objective[Any]]:
    """One of OBJECTIVES, or the class that `module:Class` names. Raises UsageError for what is neither."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(
            f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}; or module:Class for one of your own"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"objective {name!r}: {error}; is the module on PYTHONPATH?") from None
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UsageError(
            f"objective {name!r}: expected a subclass of genrecal.objectives.base.Objective, got {found!r}"
        )
    return found
