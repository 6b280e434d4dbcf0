"""Where a network looked, and checks of it; calling it runs `explain.cam.explain`"""

from .. import _make_callable

_make_callable(__name__, "explain.cam", "explain")
