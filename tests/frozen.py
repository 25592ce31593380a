"""What was imported before this is not garbage: it is left out of every later collection."""

import gc

gc.collect()
gc.freeze()
