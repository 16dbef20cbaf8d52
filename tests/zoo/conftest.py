"""Nothing here is a test, and looking for doctests would import torch into every test process."""

collect_ignore_glob = ["*.py"]
