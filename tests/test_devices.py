"Several processes: the same batches, the same losses, each scan once"
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import two_processes as two

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    "Two processes on this machine, by gloo"
    out = tmp_path_factory.mktemp("two")
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE / "two_processes.py", out], capture_output=True, text=True, timeout=240,
                       env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    assert not r.returncode, r.stderr[-3000:]
    return out


@pytest.mark.parametrize("sampler", two.SAMPLERS)
def test_two_processes_learn_what_one_learns(together, tmp_path, sampler):
    one = two.train(sampler, tmp_path)
    h, c = pd.read_csv(together / sampler / "metrics.csv"), json.loads((together / sampler / "config.json").read_text())
    assert (one.config["hardware"]["processes"], c["hardware"]["processes"]) == (1, 2)
    for k in ("train_loss", "valid_loss", "steps", "lr"): assert np.allclose(h[k], one.history[k], atol=1e-5, rtol=0), (k, h[k].tolist(), one.history[k].tolist())
    p = pd.read_csv(together / sampler / "predictions.csv")
    assert p.scan_id.tolist() == one.predictions.scan_id.tolist() and len(p) == 7                 # each scan once, nothing padded
    assert np.allclose(p.prob_covid, one.predictions.prob_covid, atol=1e-5)
