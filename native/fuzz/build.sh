#!/usr/bin/env bash
# Builds the fuzz targets with the address and undefined-behaviour sanitizers into the folder $1:
#   fuzz_program   the loader: program.json and weights.safetensors
#   fuzz_lower     the loader, and the choice of kernels for what it lets through
#   fuzz_calls     programs built from the table's grammar, lowered and executed, on one thread and on four
# With clang (Debian's clang and libclang-rt-14-dev) they are driven by libFuzzer; for ten minutes:
#   $1/fuzz_program -max_total_time=600 native/fuzz/corpus
# With CXX=g++ only fuzz_calls is built, driven by random bytes; for an hour on each of two cores:
#   $1/fuzz_calls 3600 1 & $1/fuzz_calls 3600 1000000000
# Needs CMake and the Python package nlohmann_json.
set -euo pipefail
native="$(cd "$(dirname "$0")/.." && pwd)"
out="$(mkdir -p "$1" && cd "$1" && pwd)"
json="$("${PYTHON:-python3}" "$native/locate.py" nlohmann_json nlohmann/json.hpp)"
compiler="${CXX:-clang++}"
cmake -DFROM="$native/../quantflow/ir/aten_ops.txt" -DTO="$out/op_table_text.inc" -P "$native/embed_op_table.cmake"
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
       -I "$native/include" -I "$json" -I "$out")
case "$compiler" in
    *clang*) driven=(-fsanitize=fuzzer) watched=(-fsanitize=fuzzer-no-link) ;;
    *) driven=() watched=() ;;
esac
avx2=(-mavx2 -mfma -mf16c -mbmi2)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512)
jobs=()
compile() {  # SOURCE OBJECT FLAG...
    local source="$1" object="$2"
    shift 2
    "$compiler" "${flags[@]}" "$@" -c "$source" -o "$object" &
    jobs+=($!)
    if [ "${#jobs[@]}" -ge "$(nproc)" ]; then wait "${jobs[0]}"; jobs=("${jobs[@]:1}"); fi
}
core=()
for source in "$native"/src/{program,op_table,budget,lower,engine,thread_pool}.cpp "$native"/src/lowering/*.cpp \
    "$native"/src/lowering/ops/*.cpp; do
    object="$out/$(basename "$source" .cpp).core.o"
    compile "$source" "$object" "${watched[@]}"
    core+=("$object")
done
host=()
for source in "$native"/host/*.cpp; do
    name="$(basename "$source" .cpp)"
    case "$name" in
        *_isa) for isa in generic avx2 avx_vnni avx512_vnni; do
                   case "$isa" in
                       generic) more=() ;;
                       avx2) more=("${avx2[@]}") ;;
                       avx_vnni) more=("${avx2[@]}" -mavxvnni) ;;
                       avx512_vnni) more=("${avx512[@]}") ;;
                   esac
                   compile "$source" "$out/$name.$isa.o" "-DQF_ISA_NAMESPACE=isa_$isa" "${more[@]}"
                   host+=("$out/$name.$isa.o")
               done ;;
        *) compile "$source" "$out/$name.o"; host+=("$out/$name.o") ;;
    esac
done
compile "$native/host/int8_gemm_isa.cpp" "$out/int8_gemm_isa.amx_int8.o" -DQF_ISA_NAMESPACE=isa_amx_int8 "${avx512[@]}" \
    -mamx-tile -mamx-int8
host+=("$out/int8_gemm_isa.amx_int8.o")
targets=(fuzz_calls)
compile "$native/fuzz/fuzz_calls.cpp" "$out/fuzz_calls.target.o" "${driven[@]}"
main=()
if [ "${#driven[@]}" -gt 0 ]; then
    targets+=(fuzz_program fuzz_lower)
    compile "$native/fuzz/fuzz_program.cpp" "$out/fuzz_program.target.o" "${driven[@]}"
    compile "$native/fuzz/fuzz_program.cpp" "$out/fuzz_lower.target.o" "${driven[@]}" -DQUANTFLOW_FUZZ_LOWER
else
    compile "$native/fuzz/random_main.cpp" "$out/random_main.o"
    main=("$out/random_main.o")
fi
for job in "${jobs[@]}"; do wait "$job"; done
for target in "${targets[@]}"; do
    "$compiler" "${flags[@]}" "${driven[@]}" "$out/$target.target.o" "${main[@]}" "${core[@]}" "${host[@]}" -lpthread -ldl \
        -o "$out/$target"
done
