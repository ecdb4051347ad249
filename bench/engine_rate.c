// How many int8 multiply-accumulates a second the processor's own instructions give: exact products of u8 and s8 into
// int32, all operands in registers; of tile registers also loaded from the L1 cache, one instruction right behind the
// other (amx_int8_from_l1) or with empty instructions between (amx_int8_spaced), which is faster where two threads share a
// core. Arguments: instruction set, threads, seconds. Prints GMAC/s of all threads together.
// Compiled and run by engine_rate.py.
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// Chains of sums that hide the products' latency. Spelled out: an array of them would be kept in memory.
#define CHAINS 12
#define EACH(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7) what(8) what(9) what(10) what(11)
#define ROUNDS 2000

typedef double (*Work)(void);  // multiply-accumulates of one call

// Without VNNI an exact product of a quad takes three instructions, of codes within 7 bits.
__attribute__((target("avx2"))) static double avx2(void) {
#define SUM(i) __m256i sum##i = _mm256_setzero_si256();
    EACH(SUM)
#undef SUM
    __m256i x = _mm256_set1_epi8(1), w = x, one = _mm256_set1_epi16(1), pairs;
#define PRODUCT(i)                                                                           \
    __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"     \
                     : "+x"(sum##i), "=&x"(pairs) : "x"(x), "x"(w), "x"(one));
    for (int r = 0; r < ROUNDS; ++r) { EACH(PRODUCT) }
#undef PRODUCT
    return 32.0 * CHAINS * ROUNDS;
}

__attribute__((target("avxvnni"))) static double avx_vnni(void) {
#define SUM(i) __m256i sum##i = _mm256_setzero_si256();
    EACH(SUM)
#undef SUM
    __m256i x = _mm256_set1_epi8(1), w = x;
#define PRODUCT(i) __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum##i) : "x"(x), "x"(w));
    for (int r = 0; r < ROUNDS; ++r) { EACH(PRODUCT) }
#undef PRODUCT
    return 32.0 * CHAINS * ROUNDS;
}

__attribute__((target("avx512f,avx512vnni"))) static double avx512_vnni(void) {
#define SUM(i) __m512i sum##i = _mm512_setzero_si512();
    EACH(SUM)
#undef SUM
    __m512i x = _mm512_set1_epi8(1), w = x;
#define PRODUCT(i) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum##i) : "v"(x), "v"(w));
    for (int r = 0; r < ROUNDS; ++r) { EACH(PRODUCT) }
#undef PRODUCT
    return 64.0 * CHAINS * ROUNDS;
}

// Four tiles of sums, as many as two tiles of rows and two of weights have.
#define TILE_PRODUCTS (4.0 * 16 * 16 * 64 * ROUNDS)

// Ones: zeros, which registers begin with, may be multiplied in less time.
static _Thread_local _Alignas(64) uint8_t operands[16 * 1024];

// A tile instruction, and `space` behind it.
#define TILES_IN_STEP(space)                          \
    _tile_loadd(6, from, 64); space;                  \
    _tile_loadd(7, from + 1024, 64); space;           \
    _tile_loadd(4, from + 2048, 64); space;           \
    _tile_loadd(5, from + 3072, 64); space;
#define PRODUCTS_IN_STEP(space)                       \
    _tile_dpbusd(0, 4, 6); space;                     \
    _tile_dpbusd(1, 4, 7); space;                     \
    _tile_dpbusd(2, 5, 6); space;                     \
    _tile_dpbusd(3, 5, 7); space;
#define NO_SPACE
#define SPACE __asm__ volatile(".rept 8\n\tnop\n\t.endr")

__attribute__((target("amx-tile"))) static void begin_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    memset(operands, 1, sizeof operands);
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

__attribute__((target("amx-tile,amx-int8"))) static double amx_int8(void) {
    const uint8_t *from = operands;
    begin_tiles();
    TILES_IN_STEP(NO_SPACE)
    for (int r = 0; r < ROUNDS; ++r) { PRODUCTS_IN_STEP(SPACE) }
    _tile_release();
    return TILE_PRODUCTS;
}

// Each operand is loaded for two products.
#define FROM_L1(name, space)                                                       \
    __attribute__((target("amx-tile,amx-int8"))) static double name(void) {        \
        begin_tiles();                                                             \
        for (int r = 0; r < ROUNDS; ++r) {                                         \
            const uint8_t *from = operands + r % 4 * 4096;                         \
            TILES_IN_STEP(space)                                                   \
            PRODUCTS_IN_STEP(space)                                                \
        }                                                                          \
        _tile_release();                                                           \
        return TILE_PRODUCTS;                                                      \
    }
FROM_L1(amx_int8_from_l1, NO_SPACE)
FROM_L1(amx_int8_spaced, SPACE)

static Work work;
static double seconds;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *run(void *rate) {
    double done = 0, start, end;
    work();
    start = now();
    do done += work();
    while ((end = now()) - start < seconds);
    *(double *)rate = done / (end - start) * 1e-9;
    return NULL;
}

int main(int count, char **words) {
    static const struct { const char *name; Work work; } all[] = {
        {"avx2", avx2}, {"avx_vnni", avx_vnni}, {"avx512_vnni", avx512_vnni},
        {"amx_int8", amx_int8}, {"amx_int8_from_l1", amx_int8_from_l1}, {"amx_int8_spaced", amx_int8_spaced}};
    if (count != 4) return 2;
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
        if (strcmp(words[1], all[i].name) == 0) work = all[i].work;
    const int threads = atoi(words[2]);
    seconds = atof(words[3]);
    // ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA: the tiles belong to a process that has asked for them.
    const int has_tiles = strncmp(words[1], "amx", 3) == 0;
    if (work == NULL || threads < 1 || (has_tiles && syscall(SYS_arch_prctl, 0x1023, 18) != 0)) return 2;
    pthread_t *ids = calloc((size_t)threads, sizeof *ids);
    double *rates = calloc((size_t)threads, sizeof *rates), total = 0;
    for (int i = 0; i < threads; ++i)
        if (pthread_create(ids + i, NULL, run, rates + i) != 0) return 1;
    for (int i = 0; i < threads; ++i) {
        pthread_join(ids[i], NULL);
        total += rates[i];
    }
    printf("%.3f\n", total);
    return 0;
}
