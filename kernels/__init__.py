"""Numerics of single operators: a plain-torch reference each, and fast versions of it."""
