"""Loss and gradient of the chunked head against plain autograd and against others: time and peak memory.

    python benchmarks/loss.py [--rows 4096] [--vocab 152064] [--width 896] [--targets none,topk] [--device cuda]

Every measurement is a process of its own, on one thread, that makes the same rows, head and targets (random, of a
Gaussian's logits with a standard deviation of 4) and takes the gradient in the rows; the head is frozen. The methods
take turns. Time is the processor's, which other work on the machine changes less than the clock's; on CUDA it is the
clock's. Memory is the process's peak less what it held before; on CUDA the allocator's. "vs naive" divides medians.

- naive: whole logits and autograd (`head_losses_naive`); compiled: the same under torch.compile, after a first run.
- genrecal: `head_losses`.
- liger: Liger Kernel: fused linear cross-entropy (Triton, so on CUDA only), and its chunked distillation loss, which is
  plain torch and takes the teacher's states (the `exact` target). It works out the head's gradient as well.
- cce: Apple's cut-cross-entropy: its Triton kernels on CUDA, its torch.compile form elsewhere.

What is not installed or does not run here is named below the table with its reason.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from genrecal.objectives.losses import Exact, Sampled, Target, TopK, head_losses, head_losses_naive
from genrecal.report.summary import markdown_table
from genrecal.shards.head import FrozenHead

METHODS = {
    "topk": ("naive", "compiled", "genrecal"),
    "exact": ("naive", "liger", "genrecal"),
    "sampled": ("naive", "genrecal"),
    "none": ("naive", "compiled", "cce", "liger", "genrecal"),
}
TOP_K, DRAWS = 64, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--targets", default=",".join(METHODS))
    parser.add_argument("--chunk-rows", type=int, default=0)
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    if options.measure:
        print(json.dumps(measure(*options.measure, options)))
        return
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for _ in range(options.repeat):
        for target in options.targets.split(","):
            for method in METHODS[target]:
                if f"{method}, {target}" not in failed:
                    run(method, target, found, failed)
    print(f"N = {options.rows}, V = {options.vocab}, D = {options.width}, {options.dtype}, {options.device}\n")
    print(table(found))
    for name, reason in failed.items():
        print(f"\n{name}: not measured: {reason}")


def run(method: str, target: str, found: dict[Any, list[Any]], failed: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *sys.argv, "--measure", method, target], check=False, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        failed[f"{method}, {target}"] = lines[-1] if lines else f"ended with {done.returncode} (-9: out of memory)"
        return
    found.setdefault((method, target), []).append(json.loads(done.stdout.splitlines()[-1]))
    sys.stderr.write(f"{method}, {target}: {found[method, target][-1]}\n")


def table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    def median(method: str, target: str, name: str) -> float:
        return statistics.median([one[name] for one in found.get((method, target), [])] or [float("nan")])

    rows = []
    for method, target in found:
        seconds, peak = median(method, target, "seconds"), median(method, target, "peak")
        rows.append(
            [
                {"none": "CE alone"}.get(target, f"CE and KL, {target}"),
                method,
                f"{seconds:.1f}",
                f"{seconds / median('naive', target, 'seconds'):.2f}",
                f"{peak / 1e6:,.0f}",
                f"{peak / median('naive', target, 'peak'):.3f}",
                f"{median(method, target, 'loss'):.5f}",
                f"{median(method, target, 'gradient'):.5f}",
            ]
        )
    header = ["loss", "method", "s", "vs naive", "peak MB", "vs naive", "value", "gradient's norm"]
    return markdown_table(header, rows)


# ------------------------------------------------------------------------------------------------------- one measurement


def measure(method: str, kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds, peak bytes, mean loss and norm of the gradient of the sum."""
    torch.set_num_threads(1)
    device = torch.device(options.device)
    head, hidden, ids, target = problem(kind, options, device)
    loss = loss_of(method, head, ids, target, options.chunk_rows)
    if method in ("compiled", "cce") or device.type == "cuda":  # what compiles does it now
        loss(hidden.clone().requires_grad_()).backward()
    leaf = hidden.clone().requires_grad_()
    before = reset_peak(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    value = loss(leaf)
    value.backward()
    synchronize(device)
    seconds = clock() - began
    peak = peak_bytes(device) - before
    norm = leaf.grad.float().norm().item()  # type: ignore[union-attr]
    return {"seconds": seconds, "peak": peak, "loss": value.item() / options.rows, "gradient": norm}


def problem(
    kind: str, options: argparse.Namespace, device: torch.device
) -> tuple[FrozenHead, torch.Tensor, torch.Tensor, Target]:
    """The same for every method. What the teacher knows is made up, but adds up as a teacher's would."""
    rows, vocab, width, dtype = options.rows, options.vocab, options.width, getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator).mul_(4 / width**0.5)
    head = FrozenHead(weight=weight.to(device, dtype), vocab_size=vocab)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype)
    ids = torch.randint(0, vocab, (rows,), generator=generator).to(device)
    target: Target = None
    named = torch.randint(0, vocab // TOP_K, (rows, TOP_K), generator=generator)
    named = (named + torch.arange(TOP_K) * (vocab // TOP_K)).to(device)  # distinct in a row
    p = torch.rand(rows, TOP_K, generator=generator).pow_(4)
    p = (0.9 * p / p.sum(-1, keepdim=True)).to(device)  # a tenth is left for the rest
    if kind == "topk":
        target = TopK(ids=named, log_probs=p.log())
    elif kind == "sampled":
        shares = p[:, :DRAWS] / p[:, :DRAWS].sum(-1, keepdim=True)
        entropy = -torch.special.xlogy(shares, shares).sum(-1)
        target = Sampled(ids=named[:, :DRAWS].contiguous(), weights=shares, entropy=entropy)
    elif kind == "exact":
        target = Exact(hidden=hidden + 0.5 * torch.randn(rows, width, generator=generator).to(device, dtype))
    return head, hidden, ids, target


def loss_of(method: str, head: FrozenHead, ids: torch.Tensor, target: Target, chunk_rows: int) -> Any:
    """rows -> the sum of their losses."""
    if method == "genrecal":
        return lambda x: head_losses(x, head, ids, target, chunk_rows=chunk_rows).weighted.sum()
    if method == "naive":
        return lambda x: head_losses_naive(x, head, ids, target).weighted.sum()
    if method == "compiled":
        compiled = torch.compile(head_losses_naive)
        return lambda x: compiled(x, head, ids, target).weighted.sum()
    if method == "cce":
        from cut_cross_entropy import linear_cross_entropy

        form = "cce" if head.weight.is_cuda else "torch_compile"
        return lambda x: linear_cross_entropy(x, head.weight, ids, reduction="sum", impl=form)
    if isinstance(target, Exact):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        distil = LigerFusedLinearJSDLoss(
            weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=256
        )
        return lambda x: distil(x, head.weight, target.hidden, head.weight, ids) * len(x)  # its reduction is a mean
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda x: fused(head.weight, x, ids)


def reset_peak(device: torch.device) -> int:
    """Bytes held now, from which the peak counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the resident set to what it is now
    return _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
