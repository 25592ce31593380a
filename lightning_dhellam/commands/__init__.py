"""The `dhellam` command, a module for each of its words."""
