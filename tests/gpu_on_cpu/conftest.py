"""Triton has no wheels for other systems than Linux: there is nothing to test there."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["*"]
