"""Metrics, statistics, calibration and burden; `covid_ct.evaluate(…)` calls `train.study.evaluate`"""

from .. import _make_callable

_make_callable(__name__, "train.study", "evaluate")
