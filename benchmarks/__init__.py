"""What only this repository runs: benchmarks that need more than a user's machine, and results."""
