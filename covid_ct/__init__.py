"""Learn and run COVID-19 diagnosis from chest CT: one import for what most people need

`import covid_ct as ct` loads nothing heavy; each name below is loaded when it is first used.
Four of them, `audit`, `train`, `evaluate` and `explain`, are also the subpackages of that name.
"""

__version__ = "0.1.0"

import sys as _sys
from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules={"audit", "train", "evaluate", "explain"},
    submod_attrs={
        "scan": ["Scan", "Map", "Grid", "DataError"],
        "plot": ["show_planes"],
        "phantom.chest": ["make_phantom"],
        "phantom.cohort": ["phantom_cohort"],
        "io.read": ["read", "read_mask", "write_scan", "write_mask"],
        "cohort.adapters": ["open_cohort"],
        "cohort.splits": ["split_patients"],
        "preprocess.lungs": ["lung_mask", "lung_volume_l"],
        "preprocess.cache": ["prepare"],
        "models.zoo": ["build"],
        "train.recipes": ["recipe", "change"],
        "train.study": ["cross_validate"],
        "train.loop": ["load_run"],
        "inference.predict": ["inspect", "predict"],
        "inference.segment": ["segment", "burden"],
        "inference.segmentation_files": ["write_segmentation"],
        "inference.cases": ["reading_room"],
        "evaluate.metrics": ["metrics"],
        "widgets.overlay": ["view"],
        "widgets.pipeline": ["show_pipeline"],
        "papers.reproduce": ["reproduce"],
    },
)


class _Callable(_ModuleType):
    "A subpackage that can be called: the call goes to its main function"

    def __call__(self, *args, **kwargs):
        module, name = self._main
        return getattr(_import_module(module), name)(*args, **kwargs)


def _make_callable(package, module, name):
    "Let a subpackage be called: `covid_ct.audit(path)` is `covid_ct.audit.audit.run_audit(path)`"
    here = _sys.modules[package]
    here._main = f"covid_ct.{module}", name
    here.__class__ = _Callable
