"Train toys by every sampler; run it alone or under torchrun, and the numbers agree"

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from toys import PREP, toy

from covid_ct.batches.augment import AUGMENTS
from covid_ct.batches.loaders import ScanDataset, make_loaders
from covid_ct.train.loop import Engine, fit
from covid_ct.train.recipes import change, recipe
from covid_ct.train.study import make_sampler

CLASSES = ('cap', 'covid')
SAMPLERS = dict(
    uniform={},
    class_balanced={},
    size_balanced={},
    composition=dict(composition=dict(cap=2, covid=3)),
)


def cohort(n, first):
    ratio = np.tile([0.0005, 0.02, 0.01, 0.05], n)[:n]
    return pd.DataFrame(
        [
            dict(
                patient_id=f'P{first + i:02d}',
                scan_id=f'S{first + i:02d}',
                label=CLASSES[i % 2],
                seed=first + i,
                infection_ratio=ratio[i],
            )
            for i in range(n)
        ]
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 6 * 5, 2)
    )


def train(sampler, out, steps=None):
    r = change(
        recipe(),
        'test',
        system='toy',
        name=sampler,
        classes=CLASSES,
        prep='',
        model='',
        model_kwargs={},
        epochs=2,
        lr=1e-2,
        milestones=(),
        augment='flips',
        sampler=sampler,
        sampler_kwargs=SAMPLERS[sampler],
        batch_size=5,
        keep='loss',
        accumulate=2,
        ema=0.5,
    )
    rows = cohort(13, 0)
    loaders = make_loaders(
        ScanDataset(rows, PREP, CLASSES, load=toy),
        ScanDataset(cohort(7, 50), PREP, CLASSES, load=toy),
        r.batch_size,
        make_sampler(rows, r),
        augment=AUGMENTS['flips'],
    )
    return fit(
        net(),
        *loaders,
        r,
        Path(out) / sampler,
        'auto',
        progress=False,
        engine=Engine(save_minutes=0),
    )


if __name__ == '__main__':
    for name in SAMPLERS:
        train(name, sys.argv[1])
