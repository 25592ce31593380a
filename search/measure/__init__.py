"""Measured times: profiles, their files, and trials on real steps."""
