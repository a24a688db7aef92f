#!/bin/sh
# Runs the C++ kernel test under sanitizers, for every ISA that this CPU can run:
#   tests/sanitize.sh                      AddressSanitizer and UndefinedBehaviorSanitizer
#   tests/sanitize.sh thread               ThreadSanitizer
# The builds are kept in build/. Needs cmake and g++.
set -eu
cd "$(dirname "$0")/.."
sanitizers=${1:-address,undefined}
build=build/sanitize-$(echo "$sanitizers" | tr , -)
cmake -S . -B "$build" -DMPREC_PYTHON=OFF -DMPREC_KERNEL_TEST=ON "-DMPREC_SANITIZE=$sanitizers" >/dev/null
cmake --build "$build" --parallel "${JOBS:-2}" >"$build/log" 2>&1 || { cat "$build/log"; exit 1; }
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
for threads in 1 3; do
  echo "# sanitizers: $sanitizers"
  "$build/kernel_test" --threads $threads
done
