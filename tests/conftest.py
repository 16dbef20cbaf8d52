"""Set before numpy, torch and ONNX Runtime read it: the tests run in several processes, each with one thread."""

import os

from hypothesis import HealthCheck, settings

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing here may go to the network, and a model hub that is not there must not cost a retry.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Deadlines measure the neighbours on a shared machine. `HYPOTHESIS_PROFILE=long` looks harder.
settings.register_profile("quick", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("quick"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
