"""Children of tests (workers, scripts, commands) import `tests` and the package from this checkout."""

import os

from tests.support.paths import ROOT

inherited = os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
