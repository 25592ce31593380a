#!/usr/bin/env bash
# Tests and benchmarks on a host with two GPUs: one call, under ten minutes.
#
#     benchmarks/multi_gpu/two.sh [FOLDER] [SECONDS]
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" 2 "${1:-benchmarks/multi_gpu}" "${2:-580}" a:8:2:1 b:40:2:1 a:8:1:2
