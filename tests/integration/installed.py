"""Caches `packages_distributions`: ZenML calls it for each step, and each call reads the files of all packages."""

import functools
import importlib.metadata

importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)
