"""The search in the first steps of a run: callback, session, profile."""
