#!/usr/bin/env bash
# Builds the fuzz targets with clang, libFuzzer and the address and undefined-behaviour sanitizers, into the folder $1:
#   fuzz_program   the loader: program.json and weights.safetensors
#   fuzz_lower     the loader, and the choice of kernels for what it lets through
# Needs Debian's clang and libclang-rt-14-dev, and the Python package nlohmann_json. Then, for ten minutes:
#   $1/fuzz_program -max_total_time=600 native/fuzz/corpus
set -euo pipefail
native="$(cd "$(dirname "$0")/.." && pwd)"
out="$(mkdir -p "$1" && cd "$1" && pwd)"
json="$("${PYTHON:-python3}" "$native/locate.py" nlohmann_json nlohmann/json.hpp)"
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -I "$native/include" -I "$json")
clang++ "${flags[@]}" -fsanitize=fuzzer -c "$native/fuzz/fuzz_program.cpp" -o "$out/target.o"
clang++ "${flags[@]}" -fsanitize=fuzzer -DQUANTFLOW_FUZZ_LOWER -c "$native/fuzz/fuzz_program.cpp" -o "$out/target_lower.o"
core=()
for source in "$native"/src/{program,lower,thread_pool}.cpp "$native"/src/lowering/*.cpp "$native"/src/lowering/ops/*.cpp; do
    object="$out/$(basename "$source" .cpp).core.o"
    clang++ "${flags[@]}" -fsanitize=fuzzer-no-link -c "$source" -o "$object"
    core+=("$object")
done
# The kernels are built once, for the instruction set that needs no flags.
host=()
for source in "$native"/host/*.cpp; do
    name="$(basename "$source" .cpp)"
    case "$name" in
        *_isa) for isa in generic avx2 avx_vnni avx512_vnni; do
                   clang++ "${flags[@]}" -DQF_ISA_NAMESPACE="isa_$isa" -c "$source" -o "$out/$name.$isa.o"
                   host+=("$out/$name.$isa.o")
               done ;;
        *) clang++ "${flags[@]}" -c "$source" -o "$out/$name.o"; host+=("$out/$name.o") ;;
    esac
done
clang++ "${flags[@]}" -DQF_ISA_NAMESPACE=isa_amx_int8 -c "$native/host/int8_gemm_isa.cpp" -o "$out/int8_gemm_isa.amx_int8.o"
host+=("$out/int8_gemm_isa.amx_int8.o")
clang++ "${flags[@]}" -fsanitize=fuzzer "$out/target.o" "${core[@]}" "${host[@]}" -lpthread -o "$out/fuzz_program"
clang++ "${flags[@]}" -fsanitize=fuzzer "$out/target_lower.o" "${core[@]}" "${host[@]}" -lpthread -o "$out/fuzz_lower"
