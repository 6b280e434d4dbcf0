"""The run that the package carries for its lessons."""

from pathlib import Path

import numpy as np
import torch

import covid_ct as ct
from covid_ct.demo import example_run
from covid_ct.phantom.cohort import phantom_of
from covid_ct.preprocess.cache import prep_of_recipe
from covid_ct.preprocess.resample import prepare_scan
from covid_ct.train.run_folder import RunFolder


def test_the_carried_run_is_whole_and_small():
    run = example_run()
    size = sum(p.stat().st_size for p in run.folder.rglob("*") if p.is_file())
    assert size < 700_000 and run.status == "finished"
    assert "phantoms" in run.config["trained_on"]
    half = RunFolder(run.folder).read_weights()
    assert {v.dtype for v in half.values() if v.is_floating_point()} == {torch.float16}
    assert {v.dtype for v in run.model.state_dict().values() if v.is_floating_point()} == {
        torch.float32
    }


def test_its_predictions_are_those_of_its_network():
    "For three test patients, made again from the cohort of the demo"
    run = example_run()
    recipe, test = run.recipe, run.predictions[run.predictions.part == "test"]
    cohort = ct.split_patients(ct.phantom_cohort(240, seed=0), 5, 1 / 3, seed=recipe.seed)
    rows = cohort[cohort.fold < 0]
    assert set(rows.scan_id) == set(test.scan_id)
    stored = test.set_index("scan_id")
    for _, row in rows.head(3).iterrows():
        case = phantom_of(row, shape=(48, 96, 96))
        ready = prepare_scan(case.scan, prep_of_recipe(recipe), lungs=case.lungs)
        with torch.no_grad():
            prob = run.model(torch.tensor(np.array(ready.voxels))[None, None].float()).softmax(1)
        told = stored.loc[row.scan_id, [f"prob_{c}" for c in recipe.classes]].to_numpy(float)
        assert np.abs(prob[0].numpy() - told).max() < 0.02


def test_the_features_of_its_scans_lie_beside_it():
    run = example_run()
    table = Path(run.folder / "features.csv").read_text("utf-8").splitlines()
    assert len(table) - 1 == len(run.split)
