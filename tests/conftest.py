"""What holds for every test: nothing is judged by the time it took, for a loaded machine would decide it."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("mesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mesh")

# Tests speak to servers on loopback, with clients of their own too: no proxy of this machine stands between.
for _name in ("http_proxy", "https_proxy", "all_proxy"):
    for _spelt in (_name, _name.upper()):
        os.environ.pop(_spelt, None)
