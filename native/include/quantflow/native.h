/* The C interface of quantflow's native runtime: an int8 program, executed in one call. Knows nothing of Python or torch.
 *
 * Functions return 0, QF_ERROR or QF_UNSUPPORTED; on failure `error` (of `capacity` bytes) holds one line that names
 * the place and the cause; null where something is asked for is such a failure. Handles are freed by their `_free` function, in any order. All functions may be called from
 * several threads; freeing a handle while another thread uses it may not.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define QF_ABI_VERSION 5
#define QF_ERROR 1
#define QF_UNSUPPORTED 2 /* no kernel here; the text begins with "node INDEX: " */

enum qf_dtype { QF_F32 = 0, QF_U8 = 1, QF_S8 = 2, QF_S32 = 3, QF_S64 = 4, QF_BOOL = 5 };

typedef struct qf_program qf_program;
typedef struct qf_backend qf_backend;
typedef struct qf_engine qf_engine;
typedef struct qf_plan qf_plan;

/* A dense row-major tensor; `data` stays valid as long as the program. */
typedef struct {
    const char* name;
    int32_t dtype; /* qf_dtype, or -1: a dtype that no kernel reads */
    int32_t rank;
    const int64_t* dims;
    const void* data;
} qf_tensor;

/* What one input or output looks like. A number has is_number 1 and no dims. */
typedef struct {
    int32_t dtype;
    int32_t rank;
    int64_t dims[16];
    int32_t is_channels_last; /* inputs: memory order (batch, *spatial, channels) */
    int32_t is_number;
    int64_t number;
} qf_form;

int32_t qf_abi_version(void);
/* "avx512_vnni", "avx_vnni", "avx2" or "generic": what the host kernels use on this CPU. */
const char* qf_host_isa(void);

/* From a program.json in memory and tensors of the caller's. */
int32_t qf_program_parse(const char* json, size_t size, const qf_tensor* tensors, size_t count, qf_program** program,
                         char* error, size_t capacity);
/* From files; the weights are mapped, not copied. */
int32_t qf_program_open(const char* json_path, const char* weights_path, qf_program** program, char* error,
                        size_t capacity);
void qf_program_free(qf_program*);
int32_t qf_program_nodes(const qf_program*);
/* Whether node `index` has a native kernel, as far as that shows without shapes. */
int32_t qf_program_supports(const qf_program*, int32_t index);

/* An OpenMP runtime's parallel region, such as GOMP_parallel: body(data) on `threads` threads, the caller's among them. */
typedef void (*qf_region)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
/* Host backends that are made from now on compute on that runtime's threads while those spin after other work of the
 * caller's, and on threads of their own else. Null, and in a forked child: always on threads of their own. */
void qf_host_borrow(qf_region);
/* The CPU by this library's own kernels. */
int32_t qf_backend_host(int32_t threads, qf_backend** backend, char* error, size_t capacity);
/* Intel GPU ("gpu") or the CPU ("cpu") by SYCL and oneDNN: `library` is the path of libquantflow_sycl.so. */
int32_t qf_backend_sycl(const char* library, const char* device, const char* cache_folder, qf_backend** backend,
                        char* error, size_t capacity);
void qf_backend_free(qf_backend*);

int32_t qf_engine_create(const qf_program*, const qf_backend*, qf_engine** engine, char* error, size_t capacity);
void qf_engine_free(qf_engine*);

/* Nodes [first, last) for given inputs, by value names. */
int32_t qf_plan_create(const qf_engine*, int32_t first, int32_t last, const char* const* input_names,
                       const qf_form* inputs, size_t input_count, const char* const* output_names, size_t output_count,
                       qf_plan** plan, char* error, size_t capacity);
/* As qf_plan_create, for a caller that hands codes on to other steps, as the kernels write them: those of three or more
 * dimensions are channels-last, and on the host's backend int8 codes leave, and may enter, as QF_U8, 128 higher. */
int32_t qf_step_create(const qf_engine*, int32_t first, int32_t last, const char* const* input_names,
                       const qf_form* inputs, size_t input_count, const char* const* output_names, size_t output_count,
                       qf_plan** plan, char* error, size_t capacity);
void qf_plan_free(qf_plan*);
/* The form of each output, in the order of output_names. */
void qf_plan_outputs(const qf_plan*, qf_form* outputs);
int64_t qf_plan_arena_bytes(const qf_plan*);
int32_t qf_plan_run(qf_plan*, const void* const* inputs, void* const* outputs, char* error, size_t capacity);
/* Times each kernel, least of `runs`: alone, or where several steps run together its share; writes a JSON list of
 * {"node", "kernel", "parts": of the batch, which it takes one by one, "ms": of all} and its length without the final
 * zero to `needed`; nothing is written where `room` is too small. */
int32_t qf_plan_profile(qf_plan*, const void* const* inputs, void* const* outputs, int32_t runs, char* json, size_t room,
                        size_t* needed, char* error, size_t capacity);

/* What the steps whose cut into tasks is chosen by predicted cost are predicted to take together, in ms. */
int32_t qf_plan_predicted_ms(qf_plan*, double* ms, char* error, size_t capacity);
/* Runs steps that might be cut in several ways in each of them, and makes this plan, and all that are made from now on in
 * this process, with the fastest; every way gives the same result. Only such steps run, at most two of each shape, so that
 * what is in the outputs afterwards means nothing. At most `most` ways per step, none of which is
 * predicted to take more than (1 + margin) of the best; the least of at most `runs` times each, of at least two, within
 * about `budget_ms`. Writes a JSON list, one entry per shape: {"node": the first of its steps, "kernel", "shape", "count",
 * "kept": place in "ways", "ways": [{"rows", "panels", "predicted_ms", "ms" of one step}]}. The last way
 * may be one on other kernels, which says their "shape": with tile registers, steps of few weights may take vectors.
 * Entries of the kernel "host.lines" are steps, from "node" on, that may run together, "rows" lines at a time; all lines of
 * their "shape": step by step. They are timed both ways, as often, within as much time.
 * `room`, `needed`: as above. */
int32_t qf_plan_tune(qf_plan*, const void* const* inputs, void* const* outputs, int32_t runs, int32_t most,
                     double margin, double budget_ms, char* json, size_t room, size_t* needed, char* error,
                     size_t capacity);
/* Takes up what qf_plan_tune kept in an earlier process on this machine. A way that a step of that shape doesn't have is
 * not taken. */
int32_t qf_host_keep_way(const char* shape, int64_t rows, int64_t panels, char* error, size_t capacity);

/* What the host's kernels are chosen by: {"cpu", "isa", "l1_bytes", "l2_bytes", "caches": where these sizes come from,
 * "is_measured", "ghz", "rates": {name: cycles}, "built_in": {name: cycles}}. host/rates.hpp says what each counts; where
 * tile registers are in use, those of the kernels on vectors are there, too, as "vectors_" and the name. */
int32_t qf_host_rates(char* json, size_t room, size_t* needed, char* error, size_t capacity);
/* Measures the rates in about a third of a second and takes them up; plans that exist stay as they are. */
int32_t qf_host_measure_rates(int32_t threads, char* error, size_t capacity);
/* Takes up rates that were measured in an earlier process on this machine: as many as qf_host_rates has names, in the
 * names' alphabetical order, with ghz last. None: the built-in ones again. */
int32_t qf_host_set_rates(const double* values, size_t count, char* error, size_t capacity);

/* How far `actual` is from `expected`, both of `count` values: sums = {sum x^2, sum (x - x')^2, max |x|, max |x - x'|}.
 * `actual` is QF_F32, or QF_U8 or QF_S8 codes of x' = (q - zero_point) * scale. Where a value is not finite, the second
 * sum is not either, and the others mean nothing. */
int32_t qf_error_sums(const float* expected, const void* actual, int32_t dtype, float scale, int32_t zero_point,
                      size_t count, double* sums, char* error, size_t capacity);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
