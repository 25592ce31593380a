"""A folder for `PYTHONPATH`: Apex's GEMM that Megatron-core asks for, by torch's own."""
