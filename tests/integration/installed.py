"""Which package brought a module is looked up once: ZenML asks for each step, and reads all packages' files for it."""

import functools
import importlib.metadata

importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)
