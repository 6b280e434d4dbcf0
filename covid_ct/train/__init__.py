"""Losses, recipes, the training loop and what a training leaves; `covid_ct.train(…)` calls `train.study.train`"""

from .. import _make_callable

_make_callable(__name__, "train.study", "train")
