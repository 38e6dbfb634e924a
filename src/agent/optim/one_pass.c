/* The update of one_pass.py for CPUs: the same steps on a block of 256 numbers at a time, which stays in the first cache.

   Compiled by one_pass_c.py, without contraction to fused multiply-adds and without any licence to reorder. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 256, DROPPED = 32 - 20 };
static const float NO_SCALE = 1e-30f;

typedef struct {
    const float *numbers;
    const uint8_t *nearest;
} Table;

typedef struct {
    void *weight;
    const void *gradient;
    void *average; /* uint8_t codes if eight_bit, else float */
    float *average_scale;
    void *root; /* the second moment itself if not eight_bit */
    float *root_scale;
    Table signed_table, unsigned_table;
    int64_t width, first;
    float gradient_scale, keep_first, add_first, keep_second, add_second, decay, rate, correction, eps;
    uint32_t before, within;
    int32_t weight_is_bfloat16, gradient_is_bfloat16, eight_bit;
} Update;

static void widen(const void *from, int is_bfloat16, int64_t at, int count, float *to) {
    if (is_bfloat16) {
        const uint16_t *halves = (const uint16_t *)from + at;
        uint32_t words[BLOCK];
        for (int i = 0; i < count; i++) words[i] = (uint32_t)halves[i] << 16;
        memcpy(to, words, count * sizeof(float));
    } else {
        memcpy(to, (const float *)from + at, count * sizeof(float));
    }
}

/* 16 random bits for each of `count` positions from `first` on: triple32 of a counter, one word for two neighbours. */
static void random_bits(uint32_t before, uint32_t within, int64_t first, int count, uint32_t *bits) {
    uint32_t words[BLOCK / 2 + 1], halves[BLOCK + 2];
    uint64_t counter = (uint64_t)first >> 1;
    uint32_t low = (uint32_t)counter, upper = (uint32_t)(counter >> 32);
    for (int i = 0; i < BLOCK / 2 + 1; i++) {
        uint32_t word = low + i, high = upper + (word < low);
        word ^= before + high * 0x9E3779B9u;
        word = (word ^ word >> 17) * 0xED5AD4BBu;
        word = (word ^ word >> 11) * 0xAC4C1B51u;
        word += within + high * 0x85EBCA6Bu;
        word = (word ^ word >> 15) * 0x31848BABu;
        words[i] = word ^ word >> 14;
    }
    for (int i = 0; i < BLOCK / 2 + 1; i++) {
        halves[2 * i] = words[i] & 0xFFFF;
        halves[2 * i + 1] = words[i] >> 16;
    }
    memcpy(bits, halves + (first & 1), count * sizeof(uint32_t));
}

static void dequantise(const uint8_t *codes, float scale, const float *numbers, int count, float *to) {
    for (int i = 0; i < count; i++) to[i] = numbers[codes[i]] * scale;
}

static void quantise(const float *values, const uint8_t *nearest, int count, uint8_t *codes, float *scale) {
    float largest = 0.0f;
    uint32_t words[BLOCK];
    float divided[BLOCK];
    for (int i = 0; i < count; i++) {
        float size = fabsf(values[i]);
        largest = size > largest ? size : largest;
    }
    *scale = largest;
    largest = largest < NO_SCALE ? NO_SCALE : largest;
    for (int i = 0; i < count; i++) divided[i] = values[i] / largest;
    memcpy(words, divided, count * sizeof(float));
    for (int i = 0; i < count; i++) codes[i] = nearest[words[i] >> DROPPED];
}

static void store(const Update *u, const float *values, int64_t at, int count) {
    if (!u->weight_is_bfloat16) {
        memcpy((float *)u->weight + at, values, count * sizeof(float));
        return;
    }
    uint32_t words[BLOCK], bits[BLOCK];
    uint16_t *weight = (uint16_t *)u->weight + at;
    random_bits(u->before, u->within, u->first + at, count, bits);
    memcpy(words, values, count * sizeof(float));
    for (int i = 0; i < count; i++) weight[i] = (uint16_t)((words[i] + bits[i]) >> 16);
}

static void update_block(const Update *u, int64_t block, int64_t at, int count) {
    float g[BLOCK], m[BLOCK], v[BLOCK], r[BLOCK], value[BLOCK];
    widen(u->gradient, u->gradient_is_bfloat16, at, count, g);
    widen(u->weight, u->weight_is_bfloat16, at, count, value);
    if (u->eight_bit) {
        dequantise((uint8_t *)u->average + at, u->average_scale[block], u->signed_table.numbers, count, m);
        dequantise((uint8_t *)u->root + at, u->root_scale[block], u->unsigned_table.numbers, count, v);
        for (int i = 0; i < count; i++) v[i] = v[i] * v[i];
    } else {
        memcpy(m, (float *)u->average + at, count * sizeof(float));
        memcpy(v, (float *)u->root + at, count * sizeof(float));
    }
    for (int i = 0; i < count; i++) {
        g[i] = g[i] * u->gradient_scale;
        m[i] = m[i] * u->keep_first + g[i] * u->add_first;
        v[i] = v[i] * u->keep_second + (g[i] * g[i]) * u->add_second;
        r[i] = sqrtf(v[i]);
        value[i] = value[i] * u->decay - m[i] / (r[i] * u->correction + u->eps) * u->rate;
    }
    store(u, value, at, count);
    if (u->eight_bit) {
        quantise(m, u->signed_table.nearest, count, (uint8_t *)u->average + at, u->average_scale + block);
        quantise(r, u->unsigned_table.nearest, count, (uint8_t *)u->root + at, u->root_scale + block);
    } else {
        memcpy((float *)u->average + at, m, count * sizeof(float));
        memcpy((float *)u->root + at, v, count * sizeof(float));
    }
}

/* Updates the blocks from `begin` to before `end`; they are counted row by row. */
void update(const Update *u, int64_t begin, int64_t end) {
    int64_t blocks = (u->width + BLOCK - 1) / BLOCK;
    for (int64_t block = begin; block < end; block++) {
        int64_t column = block % blocks * BLOCK, left = u->width - column;
        update_block(u, block, block / blocks * u->width + column, left < BLOCK ? (int)left : BLOCK);
    }
}
