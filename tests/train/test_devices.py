"Several processes: the same batches, the same losses, each scan once"

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import two_processes as two

from covid_ct.phantom.cohort import phantom_cohort, write_phantom_cohort
from covid_ct.train.launch import launch, slurm_script
from covid_ct.train.optimize import TrainError

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    "Two processes on this machine, by gloo"
    out = tmp_path_factory.mktemp("two")
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            HERE / "two_processes.py",
            out,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "ACCELERATE_USE_CPU": "true",
        },
    )
    assert not r.returncode, r.stderr[-3000:]
    return out


@pytest.mark.parametrize("sampler", two.SAMPLERS)
def test_two_processes_learn_what_one_learns(together, tmp_path, sampler):
    one = two.train(sampler, tmp_path)
    h, c = (
        pd.read_csv(together / sampler / "metrics.csv"),
        json.loads((together / sampler / "config.json").read_text()),
    )
    assert (one.config["hardware"]["processes"], c["hardware"]["processes"]) == (1, 2)
    for k in ("train_loss", "valid_loss", "steps", "lr"):
        assert np.allclose(h[k], one.history[k], atol=1e-5, rtol=0), (
            k,
            h[k].tolist(),
            one.history[k].tolist(),
        )
    p = pd.read_csv(together / sampler / "predictions.csv")
    assert (
        p.scan_id.tolist() == one.predictions.scan_id.tolist() and len(p) == 7
    )  # each scan once, nothing padded
    assert np.allclose(p.prob_covid, one.predictions.prob_covid, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes,by",
    [
        (
            1,
            [
                "accelerate.commands.launch",
                "--cpu",
                "--num_processes",
                "1",
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
            ],
        ),
        (2, ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ],
)
def test_the_commands_of_the_page(tmp_path, processes, by):
    "Both launchers, from a script that knows nothing of processes"
    # on processors Accelerate's launcher starts more than one process only through MPI
    script = tmp_path / "train.py"
    script.write_text("import sys, two_processes\ntwo_processes.train('uniform', sys.argv[1])\n")
    r = subprocess.run(
        [sys.executable, "-m", *by, script, tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "ACCELERATE_USE_CPU": "true",
        },
    )
    assert not r.returncode, r.stderr[-3000:]
    assert (
        json.loads((tmp_path / "uniform" / "config.json").read_text())["hardware"]["processes"]
        == processes
    )


def test_jobs_for_a_cluster():
    text = slurm_script("train.py --out run", nodes=2, gpus=4, hours=1.75, name="study")
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash" and {
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=1:45:00",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --ntasks-per-node=1",
    } <= set(lines)
    assert lines[-1].startswith("srun torchrun --nnodes 2 --nproc_per_node 4") and lines[
        -1
    ].endswith("train.py --out run")
    for bad in (dict(nodes=0), dict(gpus=0), dict(hours=0)):
        with pytest.raises(TrainError):
            slurm_script("x", **bad)
    with pytest.raises(TrainError, match="no crowd"):
        launch(print, processes=1)
    if not torch.cuda.is_available():
        with pytest.raises(TrainError, match="no crowd"):
            launch(print)


@pytest.mark.slow
def test_the_package_s_own_command_in_two_processes(tmp_path):
    "From a table of files; each scan of the validation and test patients is answered once"
    rows = phantom_cohort(18, seed=4, second_scan=0)
    write_phantom_cohort(tmp_path / "c", rows, shape=(32, 48, 48), progress=False)
    command = [
        Path(sys.executable).with_name("covid-ct"),
        "train",
        tmp_path / "c" / "cohort.csv",
        tmp_path / "run",
        "--recipe",
        "darnet/tiny",
        "--set",
        "epochs=1",
        "milestones=[]",
        "batch_size=4",
        'model_kwargs={"classes":3,"depth":32,"width":4,"blocks":[1,1,1,1],"strides":[1,2,2,1]}',
    ]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 --no-python".split()
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    r = subprocess.run(
        [sys.executable, *torchrun, *command],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"},
    )
    assert not r.returncode, r.stderr[-3000:]
    c = json.loads((tmp_path / "run" / "config.json").read_text())
    p = pd.read_csv(tmp_path / "run" / "predictions.csv")
    split = pd.read_csv(tmp_path / "run" / "split.csv")
    assert (c["hardware"]["processes"], c["status"]) == (2, "finished")
    for part, fold in (("valid", 0), ("test", -1)):
        assert sorted(p[p.part == part].scan_id) == sorted(split[split.fold == fold].scan_id)
