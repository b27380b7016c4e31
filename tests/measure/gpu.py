"""What a GPU gets from this package: speed against loops by hand and against one CUDA graph, memory, correctness.

    python tests/measure/gpu.py                        # all, in under ten minutes on one GPU
    python tests/measure/gpu.py --go-on                # what the file does not have yet
    python tests/measure/gpu.py --section tent memo
    python tests/measure/gpu.py --smoke                # tiny nets, a few batches; without a GPU this is what runs

Cases run in the order of their importance, each guarded; what went wrong, what needs a GPU and what the budget left out
is named at the end. The file grows with each case; ``--show`` prints it. Times are medians of single synchronised
calls, taken in turn. Columns of the sections:

tent, compiled, zerosiam
    ``forward``: no gradients. ``by hand``: the usual loop (tests/measure/by_hand.py). ``floor``: forward, gradients and
    step, with nothing beside them, as one CUDA graph (on a CPU ``least``, the same without the graph). ``plain``,
    ``captured``, ``compiled``, ``lean``: this package. MB: the peak while it was built and called, beyond the rest.
rivals
    The authors' algorithms by hand, with filters that keep all samples, so that both do all of the work.
memo
    Images a second; ``bare``: the passes alone, of views that were made before.
correct
    Largest difference of logits and state after five batches, over nets with BatchNorm, GroupNorm and LayerNorm and
    batches of 1 and 8; how many of the runs with ``deterministic=True`` were equal bit by bit to a first, plain one.
waits
    A step of a method: operations, those that ask the host, and on a GPU kernels and waits for it.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from cases import Account, Case, Row
from gpu_bench import Bench, set_tf32
from gpu_checks import correct, waits
from gpu_speed import compiled, digits, memo, meta, rivals, tent, trainer, zerosiam
from plumbing import arguments

ROOT = Path(__file__).parents[2]
GOALS = [  # on an H100: section, row, column, at most (MEMO: at least)
    *(("tent", f"ResNet-50 bf16 b{b}", "captured, ms", goal) for b, goal in ((1, 2.0), (16, 4.9), (64, 12.0))),
    ("compiled", "ResNet-50 bf16 b64", "compiled, ms", 12.0),
    *(("tent", f"ViT-B bf16 b{b}", "captured, ms", goal) for b, goal in ((1, 2.0), (16, 5.9), (64, 17.0))),
    ("compiled", "ViT-B bf16 b64", "compiled, ms", 17.0),
    *(("tent", f"ResNet-26-GN exact b{b}", "captured, ms", goal) for b, goal in ((1, 1.2), (16, 1.5), (64, 2.6))),
    *(("tent", f"ResNet-50 exact b{b}", "captured, ms", goal) for b, goal in ((1, 4.6), (16, 15.9), (64, 53.3))),
    ("tent", "ResNet-50 exact b64", "captured lean, MB", 3200),
    ("tent", "ResNet-50 exact b64", "captured lean / captured", 1.0),
    *(
        ("zerosiam", f"ResNet-50 bf16 b{b}", "captured / captured tent", goal)
        for b, goal in ((1, 1.2), (16, 1.1), (64, 1.03))
    ),
    *(
        ("rivals", f"{name} ResNet-50 exact b{b}", "captured / by hand", goal)
        for name in ("eata", "sar", "deyo", "come")
        for b, goal in ((1, 0.5), (16, 0.7), (64, 0.98))
    ),
    ("rivals", "cotta ResNet-50 exact b64", "captured / by hand", 0.35),
    ("memo", "ResNet-26-GN norm S=64", "auto, images/s", 1100),
    ("memo", "ResNet-26-GN all S=64", "auto, images/s", 65),
    ("memo", "ResNet-50 norm S=8", "auto, images/s", 70),
    ("memo", "ResNet-50 all S=8", "auto, images/s", 35),
    ("meta", "outer step", "ours, ms", 45.0),
    ("meta", "outer step", "ours, MB", 191),
    ("trainer", "tent", "TensorBoard / bare", 1.15),
    ("digits", "benchmark", "GPU / CPU", 0.5),
]


SECTIONS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "tent": tent,
    "correct": correct,
    "zerosiam": zerosiam,
    "rivals": rivals,
    "waits": waits,
    "memo": memo,
    "meta": meta,
    "trainer": trainer,
    "compiled": compiled,
    "digits": digits,
}


def machine(device: str) -> Row:
    """What ran this, and when."""
    cuda = device == "cuda"
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, no GPU",
        "torch": torch.__version__,
        "cuDNN": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "commit": done.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def goals(rows: Mapping[str, Mapping[str, Row]]) -> str:
    """A table of what was to be reached on an H100, beside what was."""
    lines = ["", "## goals (H100)", "", "| | goal | measured |", "|---|---:|---:|"]
    for section, case, column, goal in GOALS:
        value = rows.get(section, {}).get(case, {}).get(column)
        sign = ">=" if "images/s" in column else "<="
        lines.append(
            f"| {section}: {case}: {column} | {sign} {goal:g} | {'not run' if value is None else f'{value:.3g}'} |"
        )
    return "\n".join(lines)


def main(args: list[str] | None = None) -> Account:
    """Run the cases and print all that is known."""
    options = arguments(
        __doc__,
        args,
        section=list(SECTIONS),
        budget=(540.0, "seconds"),
        output=("runs/gpu.json", "file of the results"),
        smoke=(False, "tiny nets, few calls"),
        quick=(False, "without the benchmark on the digits"),
        go_on=(False, "keep what the file has, run the rest"),
        show=(False, "print what the file has, run nothing"),
        device=("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu"),
    )
    smoke = options.smoke or options.device != "cuda"
    account = Account(machine(options.device), options.budget, Path(options.output))
    if options.go_on or options.show:
        account.go_on()
    if not options.show:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first matrix product
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        set_tf32(False)
        run_all(Bench(options.device, smoke, account), options)
    print(account.text())
    if not smoke or options.show:
        print(goals(account.rows))
    return account


def run_all(bench: Bench, options: Namespace) -> None:
    """The cases of the sections that were asked for, by rank."""
    if not bench.cuda:
        bench.account.left_out["columns floor, captured, compiled, GPU - CPU, kernels, idle, MB"] = bench.without_cuda
    cases: list[Case] = []
    for name in options.section:
        if name == "digits" and options.quick:
            bench.account.left_out["digits"] = "--quick"
            continue
        with bench.account.guarded(name):
            cases += SECTIONS[name](bench)
    for case in sorted(cases, key=lambda case: case.rank):
        bench.account.run(case)
        if bench.cuda and is_broken():
            go_on_afresh(bench.account)


def is_broken() -> bool:
    """Whether the GPU answers no more in this process."""
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def go_on_afresh(account: Account) -> None:
    """A new process in the place of this one, for the cases that are left."""
    rest, skip = [], False
    for word in sys.argv[1:]:
        if not skip and not word.startswith("--budget"):
            rest.append(word)
        skip = word == "--budget"
    sys.stdout.flush()
    command = [sys.executable, __file__, *dict.fromkeys([*rest, "--go-on"]), f"--budget={account.left():.0f}"]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
