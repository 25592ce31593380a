"""The best order of a pair of layers."""
