"""Metrics, statistics, calibration and burden; calling it runs `train.study.evaluate`"""

from .. import _make_callable

_make_callable(__name__, "train.study", "evaluate")
