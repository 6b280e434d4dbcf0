"""What is wrong with a data set, before any network; calling it runs `audit.audit.run_audit`"""

from .. import _make_callable

_make_callable(__name__, "audit.audit", "run_audit")
