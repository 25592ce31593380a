"""The machine model: costs, memory, and what a step would do."""
