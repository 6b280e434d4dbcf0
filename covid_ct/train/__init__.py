"""Losses, recipes, the loop and what a training leaves; calling it runs `train.study.train`"""

from .. import _make_callable

_make_callable(__name__, "train.study", "train")
