"""What is wrong with a data set, before any network; `covid_ct.audit(…)` calls `audit.audit.run_audit`"""

from .. import _make_callable

_make_callable(__name__, "audit.audit", "run_audit")
