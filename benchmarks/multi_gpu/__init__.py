"""Scripts and results of hosts with several GPUs."""
