"""Predict runs on some processes, one after the other; run by the tests.

python adapt_on_processes.py PROCESSES DIRECTORY CASE...     PROCESSES: 1 joins the batches of two synchronised ones
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning.pytorch import seed_everything

from lightning_tta import ConfigError, DigitsData, TestTimeAdaptation
from lightning_tta.methods import EATA, ETA, LAME, MEMO, CoTTA, Norm, Tent, ZeroSiam
from nets import make_net
from processes import trainer

DOMAINS = ["gaussian_noise", "contrast", "clean"]
ETA_OPTIONS = {"entropy_margin": 0.9, "diversity_margin": 0.995, "lr": 0.02}  # kept: 0.25 to 0.62 of a batch
REPLICAS = {
    "replicas_tent": (partial(Tent, lr=1e-2), {}, {}),
    "replicas_cotta": (partial(CoTTA, lr=1e-2, restore=0.1, views=4, anchor_threshold=1.0), {}, {"num_images": 20}),
    "replicas_eata": (partial(EATA, **ETA_OPTIONS), {"reset": "domain"}, {"stream": "continual"}),
    "replicas_batch": (partial(MEMO, views=4), {"reset": "batch"}, {"num_images": 10}),
    "replicas_blind": (partial(Tent, lr=1e-2), {"reset_every": 2}, {"stream": "blind_spot"}),
    "replicas_recurring": (partial(Tent, lr=1e-2), {"reset": "domain"}, {"stream": "recurring", "visits": 3}),
    "replicas_polluted": (partial(Tent, lr=1e-2), {}, {"stream": "polluted", "pollution": 0.3}),
}
SYNCHRONISED = {
    "synchronised_tent": ("bn", partial(Tent, lr=1e-2), {}, {}),
    "synchronised_zerosiam": ("gn", partial(ZeroSiam, lr=0.02, predictor_lr=0.1), {"predict": "after"}, {}),
    "synchronised_eata": ("bn", partial(EATA, **ETA_OPTIONS), {}, {"stream": "mixed"}),
    "synchronised_eta": (
        "gn",
        partial(ETA, entropy_margin=0.95, diversity_margin=0.999, lr=0.02),
        {"reset_every": 2},
        {"stream": "continual"},
    ),
    "synchronised_norm": ("bn", partial(Norm, momentum=0.3), {}, {"num_images": 33}),  # the last batch has one image
    "synchronised_blind": ("bn", partial(Tent, lr=1e-2), {}, {"stream": "blind_spot"}),
    "synchronised_recurring": ("bn", partial(Tent, lr=1e-2), {}, {"stream": "recurring", "visits": 2}),
    "synchronised_markov": ("bn", partial(Tent, lr=1e-2), {}, {"stream": "markov", "num_images": 200}),
    "synchronised_polluted": ("bn", partial(Tent, lr=1e-2), {}, {"stream": "polluted"}),
}
REFUSED = {
    "never": (partial(Tent, lr=1e-2), {}, {"stream": "continual"}),
    "mixed": (partial(Tent, lr=1e-2), {"reset": "batch"}, {"stream": "mixed"}),
    "method": (LAME, {"processes": "synchronised"}, {}),
    "domains": (partial(Tent, lr=1e-2), {}, {"domains": ["clean"]}),
    "nets": (partial(Tent, lr=1e-2), {}, {}),
}


def run(processes, root, kind, method, options, data_options):
    """One run; returns the module."""
    seed_everything(0, verbose=False)
    seed = int(os.environ.get("LOCAL_RANK", "0")) if root.name == "nets" else 0
    data = DigitsData(**{"domains": DOMAINS, "num_images": 40, "batch_size": 8, "cache_dir": "none", **data_options})
    module = TestTimeAdaptation(method, backbone=make_net(kind, num_classes=10, seed=seed), **options)
    trainer(root, processes).predict(module, datamodule=data, return_predictions=False)
    return module


def main(processes, root, *cases):
    torch.set_num_threads(1)
    for case in cases:
        directory = Path(root) / case
        if case in REPLICAS:
            run(processes, directory, "bn", *REPLICAS[case])
        elif case in SYNCHRONISED:
            kind, method, options, data_options = SYNCHRONISED[case]
            if processes == 1:
                data_options = {"batch_size": 16, **data_options}
            module = run(processes, directory, kind, method, {"processes": "synchronised", **options}, data_options)
            state = {"tensors": module.method.adaptable, "memory": module.method.memory}
            torch.save(state, directory / f"state.rank{module.global_rank}.pt")
        else:
            try:
                run(processes, directory, "bn", *REFUSED[case])
            except ConfigError as error:
                (Path(root) / f"{case}.{torch.distributed.get_rank()}.txt").write_text(str(error))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
