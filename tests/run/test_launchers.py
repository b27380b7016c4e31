"""The launchers of configs/trainer, two processes on the CPU: torchrun, and the variables that SLURM sets."""

import json
import os
import subprocess
import sys

import pytest

from lightning_tta.cli.main import main
from processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
DIGITS = [
    *("predict", "--config", "configs/digits/predict.yaml", "--model.source_ckpt", "none", "--seed_everything", "0"),
    *("--model.backbone", "cifar/resnet20", "--model.num_classes", "10", "--model.method", "Tent"),
    *("--data.num_images", "20", "--data.domains", "[gaussian_noise, motion_blur, contrast]"),
]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"


def finished(*started):
    """Wait for processes; the first failure tells all."""
    for process in started:
        text, _ = process.communicate(timeout=300)
        assert process.returncode == 0, text[-3000:]


def start(command, **variables):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**ENVIRONMENT, **variables}, **pipes)


def arguments(config, devices, nodes, directory):
    launcher = ["--config", f"configs/trainer/{config}.yaml", "--trainer.accelerator", "cpu"]
    counts = ["--trainer.devices", str(devices), "--trainer.num_nodes", str(nodes)]
    return ["-m", "lightning_tta", *DIGITS, *launcher, *counts, "--trainer.logger.save_dir", str(directory)]


def test_torchrun_and_slurm_give_what_one_process_gives(tmp_path):
    alone = [*DIGITS, "--trainer.accelerator", "cpu", "--trainer.logger.save_dir", str(tmp_path / "alone")]
    main(alone)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished(start([*torchrun, *arguments("torchrun", 2, 1, tmp_path / "torchrun")]))

    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "run", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    one_machine = "127.0.0.1"  # it plays both
    where = {"SLURM_NODELIST": one_machine, "MASTER_ADDR": one_machine, "MASTER_PORT": free_port()}
    command = [sys.executable, *arguments("slurm", 1, 2, tmp_path / "slurm")]
    tasks = [
        start(command, **job, **where, SLURM_PROCID=str(i), SLURM_NODEID=str(i), SLURM_LOCALID="0") for i in range(2)
    ]
    finished(*tasks)

    (one,) = (tmp_path / "alone").rglob("predictions.csv")
    for name in ("torchrun", "slurm"):
        (path,) = (tmp_path / name).rglob("predictions.csv")
        assert path.read_bytes() == one.read_bytes()
        report = json.loads((path.parent / "report.json").read_text())
        assert (report["protocol"]["world_size"], report["protocol"]["mode"]) == (2, "replicas")
        assert report["images"] == 60
