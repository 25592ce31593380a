"""The pipeline: its schedules as data, and the split of the layers."""
