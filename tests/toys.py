"""A scan of a few voxels, for the tests of preparing and loading; worker processes find it by
this module's name"""

import numpy as np

from covid_ct.preprocess.resample import Prep
from covid_ct.scan import CohortError, Scan

SIZE = (6, 12, 10)
PREP = Prep(size=SIZE)
LABELS = ('healthy', 'cap', 'covid')


class Toy:
    "What a phantom offers, in a few voxels"

    def __init__(self, row):
        rng = np.random.default_rng(int(row['seed']))
        self.scan = Scan(
            rng.normal(-600, 200, (8, 16, 14)).clip(-1000, 400).astype('i2'),
            (5.0, 2.0, 2.0),
            scan_id=row['scan_id'],
            patient_id=row['patient_id'],
        )
        self.lungs = np.zeros(self.scan.shape, bool)
        self.lungs[1:7, 3:13, 2:12] = True
        self.infection = np.zeros(self.scan.shape, bool)
        self.infection[2:4, 5:9, 3:7] = row['label'] != 'healthy'


def toy(row):
    return Toy(row)


def fails(row):
    if row['scan_id'] == 'S04':
        raise OSError('scratched')
    if row['scan_id'] == 'S07':
        raise CohortError('S07', 'is odd', 'Look.')
    return Toy(row)
