#!/usr/bin/env bash
# Tests and benchmarks on a host with four GPUs: one call, under ten minutes.
#
#     benchmarks/multi_gpu/four.sh [FOLDER] [SECONDS]
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" 4 "${1:-benchmarks/multi_gpu}" "${2:-580}" b:40:4:1 a:8:4:1 b:40:2:2
