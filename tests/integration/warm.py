"""Work that every command of ZenML would repeat. The fork server imports this module last, and its processes inherit the results."""

import gc

from sqlalchemy.orm import configure_mappers

from steps.caching import code_version

# The relations between the classes of ZenML's store.
configure_mappers()
# The syntax trees of the project's modules, which are cached.
code_version("pipelines.chain", "stage_pipeline")
# A garbage collection in a forked process would visit a million objects of the libraries, and so copy their memory.
gc.collect()
gc.freeze()
