#!/usr/bin/env bash
# Builds the fuzz targets with the address and undefined-behaviour sanitizers into the folder $1.
#
# With g++ (the default where there is no clang++): $1/fuzz, which drives all targets by itself, guided by what they
# reach, and prints at its end what was reached of lowering and of the kernels. For an hour on two cores:
#   $1/fuzz --seconds 3600 --jobs 2 --seed 1 native/fuzz/corpus
# What it builds is compared with the reference by native/fuzz/compare.py.
# With clang++ (Debian's clang and libclang-rt-14-dev) one libFuzzer binary for each target:
#   fuzz_calls     programs built from the table's grammar, lowered and executed, on one thread, on four, with the batch in
#                  parts on eight, and with steps together on lines
#   fuzz_lower     the loader: program.json and weights.safetensors; and the choice of kernels for what it lets through
#   $1/fuzz_lower -max_total_time=600 native/fuzz/corpus
# Needs CMake and the Python package nlohmann_json. About six minutes on one core.
set -euo pipefail
native="$(cd "$(dirname "$0")/.." && pwd)"
out="$(mkdir -p "$1" && cd "$1" && pwd)"
json="$("${PYTHON:-python3}" "$native/locate.py" nlohmann_json nlohmann/json.hpp)"
compiler="${CXX:-$(command -v clang++ || command -v g++)}"
cmake -DFROM="$native/../quantflow/ir/aten_ops.txt" -DTO="$out/op_table_text.inc" -P "$native/embed_op_table.cmake"
flags=(-std=c++17 -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
       -ffp-contract=off -I "$native/include" -I "$json" -I "$out")
case "$compiler" in
    *clang*) driven=(-fsanitize=fuzzer) watched=(-fsanitize=fuzzer-no-link) ;;
    *) driven=() watched=(-fsanitize-coverage=trace-pc) ;;
esac
avx2=(-mavx2 -mfma -mf16c -mbmi2)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512)
work=()  # SOURCE OBJECT FLAG..., a line each
compile() { work+=("$(printf '%q ' "$compiler" "${flags[@]}" "${@:3}" -c "$1" -o "$2")"); }
# What takes longest comes first.
objects=()
for source in "$native"/host/int8_gemm_isa.cpp "$native"/host/*.cpp; do
    name="$(basename "$source" .cpp)"
    case "$name" in
        *_isa) for isa in generic avx2 avx_vnni avx512_vnni amx_int8; do
                   case "$isa" in
                       generic) more=() ;;
                       avx2) more=("${avx2[@]}") ;;
                       avx_vnni) more=("${avx2[@]}" -mavxvnni) ;;
                       avx512_vnni) more=("${avx512[@]}") ;;
                       amx_int8) more=("${avx512[@]}" -mamx-tile -mamx-int8) ;;
                   esac
                   object="$out/$name.$isa.o"
                   # AMX differs in int8 products only.
                   if [ "$isa" = amx_int8 ] && [ "$name" != int8_gemm_isa ]; then continue; fi
                   case " ${objects[*]} " in *" $object "*) continue ;; esac
                   compile "$source" "$object" "${watched[@]}" "-DQF_ISA_NAMESPACE=isa_$isa" "${more[@]}"
                   objects+=("$object")
               done ;;
        *) compile "$source" "$out/$name.host.o" "${watched[@]}"; objects+=("$out/$name.host.o") ;;
    esac
done
for source in "$native"/src/*.cpp "$native"/src/lowering/*.cpp "$native"/src/lowering/ops/*.cpp; do
    [ "$(basename "$source")" = capi.cpp ] && continue
    object="$out/$(basename "$source" .cpp).core.o"
    compile "$source" "$object" "${watched[@]}"
    objects+=("$object")
done
printf '%s\n' "${work[@]}" | xargs -P "${JOBS:-$(nproc)}" -d '\n' -n 1 bash -c
own=()
build() {  # SOURCE FLAG...
    local object="$out/$(basename "$1" .cpp).target.o"
    "$compiler" "${flags[@]}" "${@:2}" -c "$1" -o "$object"
    own+=("$object")
}
link() { "$compiler" "${flags[@]}" "$@" "${own[@]}" "${objects[@]}" -lpthread -ldl; }
if [ "${#driven[@]}" -gt 0 ]; then
    for target in calls lower; do
        own=()
        for source in grammar fuzz_calls fuzz_lower; do build "$native/fuzz/$source.cpp" "${watched[@]}"; done
        build "$native/fuzz/libfuzzer.cpp" "-DQUANTFLOW_TARGET=fuzz_$target"
        link "${driven[@]}" -o "$out/fuzz_$target"
    done
    exit
fi
for source in grammar fuzz_calls fuzz_lower driver reached; do build "$native/fuzz/$source.cpp"; done
# At fixed addresses: where many bits of an address are random, the sanitizer's own memory may be taken.
link -no-pie -Wl,--wrap=aligned_alloc -o "$out/fuzz"
# Which file each of the watched places is in.
"$out/fuzz" --places | addr2line -e "$out/fuzz" | sed "s|^.*/native/||; s|:.*||" > "$out/fuzz.places"
