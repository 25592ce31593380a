"""Benchmarks behind `dhellam bench NAME`, a folder for each.

A folder holds its `settings` (the options of the command), `run` (which measures) and `report` (the
table). What several of them share stands beside the folders. Each benchmark checks what it times,
prints a table, and writes it as text and JSON.
"""
