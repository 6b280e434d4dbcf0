"""Where a network looked, and whether that can be believed; `covid_ct.explain(…)` calls `explain.cam.explain`"""

from .. import _make_callable

_make_callable(__name__, "explain.cam", "explain")
