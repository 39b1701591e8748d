"""What holds for every test: nothing is judged by the time it took, for a loaded machine would decide it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("mesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mesh")
