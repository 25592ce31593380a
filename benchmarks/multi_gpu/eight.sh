#!/usr/bin/env bash
# Tests and benchmarks on a host with eight GPUs: one call, under ten minutes.
#
#     benchmarks/multi_gpu/eight.sh [FOLDER] [SECONDS]
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" 8 "${1:-benchmarks/multi_gpu}" "${2:-580}" b:40:8:1 a:8:8:1 b:40:4:2
