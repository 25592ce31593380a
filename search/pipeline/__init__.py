"""Schedules of a whole pipeline, played and compared."""
