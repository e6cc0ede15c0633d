/* Decode attention over one layer's cache, read once as it is stored. `native.py` compiles and calls this.

A task is one KV head of one batch row and a range of blocks of tokens. Per block: scores of all its query
rows, online softmax (arXiv 1805.02867), weighted sum of values. Partial results are merged in the end.

Lanes are chosen so that no sum over packed tokens runs across a vector. Keys: the words of TOKENS tokens are
transposed while they are small, lanes are tokens, a channel costs a mask, a conversion and an fma per row.
Values: lanes are channels, a token costs the same. Fields are masked, not shifted down: the power of two goes
into the query or out of the sum, exactly. Scales go into the query or the sum (per channel) or into scores
and weights (per token), zero points are products of their own.

Packed tokens may have their channels in an order, or be rotated. The query of a task is then ordered and
rotated as they are, once, and their weighted sum is turned back once, before raw tokens' is added to it. Where
keys have an order in every tile, the query is ordered for each group of tokens.

Vectors are of the kind that gcc and clang have for every machine. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* As wide as the machine's: gcc takes wider ones apart element by element. */
#if defined __AVX512F__
#define WIDTH 64
#elif defined __AVX__
#define WIDTH 32
#else
#define WIDTH 16
#endif
enum {
    LANES = WIDTH / 4,
    TOKENS = 2 * LANES,  /* unpacked together: sums of two vectors hide the latency of an fma */
    ROWS = 4,  /* of queries that share an unpacked token: as many sums as there are registers */
    BLOCK = 256,  /* tokens whose scores are kept */
    MAX_ROWS = 32,
    MAX_D = 256,
    MAX_GROUPS = MAX_D / 16,
    MAX_FIELDS = 16,
    MAX_DIGITS = 2
};
/* The first three as in SCALE_DTYPES; BYTE and QUARTERS are scales of a byte and offsets in quarters of them. */
enum { HALF, BFLOAT, FLOAT, BOOL, WORD, BYTE, QUARTERS, INT };
enum { RESIDUAL, PACKED, FRESH };
static const float LOWEST = -3.402823466e38f;

typedef float Floats __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(WIDTH / 2), aligned(2), may_alias));
typedef float Fours __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint64_t Longs __attribute__((vector_size(WIDTH), aligned(8), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(WIDTH)))  /* not to load from two cache lines at once */
#define AT(pointer) (*(Floats *)(pointer))

/* Everything comes from Python as int64, `scale` and `softcap` apart. Strides count elements; the last one is 1. */
typedef struct { const void *data; int64_t batch, head, token, dtype; } Tensor;
typedef struct { int64_t kind, first, last, slot; } Run;  /* positions first..last-1 lie from `slot` on */
typedef struct { int64_t wide, narrow, high; } Cut;  /* bits, as in layout.py */
typedef struct {
    int64_t words, masks[MAX_FIELDS];  /* unpacked: channel f * words + j is what mask f leaves of word j */
    int64_t planes[2], before, above;  /* stored: words of a token in each plane, and in the digits before; bits below */
    Cut cut;
    int64_t channels;  /* the first of those packed: not all have every digit */
} Digit;
typedef struct {
    Tensor codes, scale, zero_point, residual, fresh;
    Tensor order;  /* per head or tile, which channel each packed one is; no data: their own */
    Tensor exact;  /* the last channels of packed keys, if they are raw */
    int64_t D, per_channel, group;
    int64_t tile, orders, raw;  /* tokens that have an order of their own, or 0; orders a head has; raw channels */
    int64_t rotated;  /* channels that were rotated together, 2^i; 0: none */
    int64_t center;  /* symmetric codes: offsets are the scale times half of it; 0: they are stored */
    int64_t block;  /* tokens whose planes lie together, 2^i */
    int64_t digits;
    Digit digit[MAX_DIGITS];
    int64_t count;
    Run runs[6];
} Cached;
/* Rows of queries, or of sums, in the channels of raw tokens and in those of packed ones. */
typedef struct { float *raw, *packed; } Rows;
typedef struct {
    Tensor query, mask;
    float *out;   /* [B, H * rows, Dv] */
    float *sums;  /* [B, H * rows, 2]: the best score, and the sum of weights against it; or null */
    const float *sinks;  /* a score more for each query head, [H * group]; 0: none */
    double scale, softcap;
    int64_t B, H, group, Lq, length, origin, threads;
    Cached keys, values;
} Call;
/* Blocks start where keys start to be packed, not in the middle of a group: the first may start before 0. */
typedef struct { const Call *call; float *partial; int64_t begin, blocks, splits, tasks, next; } Work;

/* torch has an OpenMP library loaded: its threads are used, not others beside them. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float from_half(uint32_t h) {
    uint32_t rest = (h & 0x7fff) << 13, exponent = h & 0x7c00;
    float subnormal = (float)(int32_t)(h & 0x3ff) * 0x1p-24f;
    float normal = as_float(rest + ((exponent == 0x7c00 ? 224u : 112u) << 23));
    float size = exponent ? normal : subnormal;
    return h & 0x8000 ? -size : size;
}

/* n floats from element `at` on; the memory itself where it holds floats. */
static const float *load(const Tensor *x, int64_t at, int64_t n, float *room) {
    if (x->dtype == FLOAT) return (const float *)x->data + at;
    const uint16_t *bits = (const uint16_t *)x->data + at;
    const uint8_t *bytes = (const uint8_t *)x->data + at;
    if (x->dtype == HALF)
        for (int64_t i = 0; i < n; i++) room[i] = from_half(bits[i]);
    else if (x->dtype == BYTE)
        for (int64_t i = 0; i < n; i++) room[i] = from_half((uint32_t)bytes[i] << 7);
    else if (x->dtype == QUARTERS)
        for (int64_t i = 0; i < n; i++) room[i] = (float)(int8_t)bytes[i] * 0.25f;
    else
        for (int64_t i = 0; i < n; i++) room[i] = as_float((uint32_t)bits[i] << 16);
    return room;
}

INLINE int64_t place(const Tensor *x, int64_t b, int64_t h, int64_t t) {
    return b * x->batch + h * x->head + t * x->token;
}

/* n scales and n offsets from group (or token) `row` on; room for twice as many. */
static void numbers(const Cached *x, int64_t b, int64_t h, int64_t row, int64_t n, float *room,
                    const float **scale, const float **offset) {
    const float *s = *scale = load(&x->scale, place(&x->scale, b, h, row), n, room);
    float *z = room + n;
    if (!x->center) *offset = load(&x->zero_point, place(&x->zero_point, b, h, row), n, z);
    else *offset = z;
    if (x->center)
        for (int64_t i = 0; i < n; i++) z[i] = s[i] * ((float)x->center * 0.5f);
    else if (x->zero_point.dtype == QUARTERS)
        for (int64_t i = 0; i < n; i++) z[i] *= s[i];
}

/* exp of x <= 0, NaN of NaN. Cephes' polynomial; below e^-87 comes 0. */
INLINE Floats exponential(Floats x) {
    Floats shifted = x * 1.44269504f + 12582912.0f;  /* rounds to integers in the low bits */
    Floats n = shifted - 12582912.0f;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Bits bits = (Bits)p + ((Bits)shifted << 23);
    return (Floats)((bits & (Bits)(x >= -87.0f)) | ((Bits)x & (Bits)(x != x)));
}

INLINE float exponential1(float x) { return exponential(x - (Floats){0})[0]; }

/* cap * tanh(x / cap): with e = exp(-2 |x| / cap), tanh is (1 - e) / (1 + e) and has the sign of x. */
INLINE Floats capped(Floats x, float cap) {
    const Bits sign = (Bits)x & 0x80000000u;
    const Floats size = (Floats)((Bits)x ^ sign), e = exponential(size * (-2.0f / cap));
    return (Floats)((Bits)(cap * (1.0f - e) / (1.0f + e)) | sign);
}

INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

INLINE float sum_of(Floats x) {
    const Fours *parts = (const Fours *)&x;
    Fours sum = parts[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

INLINE float product(const float *a, const float *b, int64_t n) {
    Floats sum = {0};
    for (int64_t i = 0; i < n; i += LANES) sum += AT(a + i) * AT(b + i);
    return sum_of(sum);
}

/* Per channel of a digit: the mask of its field, and what makes the masked field its part of the code. */
static void constants(const Digit *digit, int64_t D, int32_t *masks, float *power) {
    int64_t c = 0;
    for (int64_t field = 0; c < digit->channels; field++) {
        const int32_t mask = (int32_t)digit->masks[field];
        const float to_code = (float)(1 << digit->above) / (float)(mask & -mask);
        for (int64_t j = 0; j < digit->words; j++, c++) masks[c] = mask, power[c] = to_code;
    }
    for (; c < D; c++) masks[c] = 0, power[c] = 0;
}

/* n floats, whole rows, times the orthonormal Hadamard matrix of Sylvester, `size` of them at a time. */
static void rotate(float *x, int64_t n, int64_t size) {
    Floats signs[LANES];  /* the matrix of LANES channels; those of more are butterflies of whole vectors */
    Bits lane = {0};
    for (uint32_t i = 0; i < LANES; i++) lane[i] = i;
    signs[0] = 1 / __builtin_sqrtf((float)size) + (Floats){0};
    for (int i = 1; i < LANES; i++)
        signs[i] = (Floats)((Bits)signs[i & (i - 1)] ^ (lane << (31 - __builtin_ctz((unsigned)i)) & 0x80000000u));
    for (const float *end = x + n; x < end; x += size) {
        for (int64_t c = 0; c < size; c += LANES) {
            Floats sum = {0};
            for (int i = 0; i < LANES; i++) sum += x[c + i] * signs[i];
            AT(x + c) = sum;
        }
        for (int64_t half = LANES; half < size; half *= 2)
            for (int64_t first = 0; first < size; first += 2 * half)
                for (int64_t c = first; c < first + half; c += LANES) {
                    const Floats a = AT(x + c), b = AT(x + c + half);
                    AT(x + c) = a + b, AT(x + c + half) = a - b;
                }
    }
}

/* How many of n tokens from `row` on are unpacked together, if their groups do not end before. */
INLINE int64_t at_once(const Cached *x, int64_t row, int64_t n) {
    return least(TOKENS, least(n, x->block - (row & (x->block - 1))));
}

/* The words of tokens from `row` on in a digit's plane. */
INLINE const uint16_t *plane(const Cached *x, const Digit *digit, int64_t b, int64_t h, int64_t row, int which) {
    const int64_t at = row & (x->block - 1);
    const int64_t before = (digit->before + (which ? digit->planes[0] : 0)) * x->block;
    const uint16_t *codes = (const uint16_t *)x->codes.data + place(&x->codes, b, h, row - at);
    return codes + before + at * digit->planes[which];
}

/* Words of two planes from their pieces, which may have others above them. The narrow one comes lowest and
   the wide one's topmost bits next to it, so that the code that is in both is whole. */
INLINE Bits joined(const Cut cut, Bits wide, Bits narrow) {
    const int bits = (int)cut.narrow, high = (int)cut.high;
    const Bits top = wide >> ((int)cut.wide - high) & ((1u << high) - 1);
    return (narrow & ((1u << bits) - 1)) | top << bits | wide << (bits + high);
}

INLINE void turned(const float *from, const int64_t columns, int64_t n, float (*to)[TOKENS]) {
    for (int64_t g = 0; g < columns; g++) {
        for (int64_t t = 0; t < n; t++) to[g][t] = from[t * columns + g];
        for (int64_t t = n; t < TOKENS; t++) to[g][t] = 0;
    }
}

/* Per token scales and offsets of n tokens, tokens along lanes: to[group][token], 0 past the last. */
static void by_group(const Cached *x, int64_t b, int64_t h, int64_t row, int64_t columns, int64_t n,
                     float (*step)[TOKENS], float (*zero)[TOKENS]) {
    float room[2 * TOKENS * MAX_GROUPS];
    const float *s, *z;
    numbers(x, b, h, row, n * columns, room, &s, &z);
    switch (n == TOKENS ? columns : 0) {  /* usual ones are faster if they are known */
    case 1: turned(s, 1, TOKENS, step), turned(z, 1, TOKENS, zero); return;
    case 2: turned(s, 2, TOKENS, step), turned(z, 2, TOKENS, zero); return;
    case 4: turned(s, 4, TOKENS, step), turned(z, 4, TOKENS, zero); return;
    default: turned(s, columns, n, step), turned(z, columns, n, zero);
    }
}

/* Four words at a time. Even tokens go to the front of LANES, odd ones behind: a shift merges them. */
INLINE void by_four(const uint16_t *from, const int64_t W, int64_t n, uint64_t (*fours)[TOKENS]) {
    for (int64_t t = 0; t < n; t++, from += W)
        for (int64_t j = 0; j < W / 4; j++)
            memcpy(&fours[j][t / LANES * LANES + t % 2 * (LANES / 2) + t % LANES / 2], from + j * 4, 8);
}

/* Words of n tokens, tokens along lanes: to[word][token], 0 past the last. */
static void transposed(const uint16_t *from, int64_t W, int64_t n, int32_t *to) {
    if (W == 2 && n == TOKENS) {  /* of the higher digit of 16 channels: a token is as wide as a lane */
        for (int64_t t = 0; t < TOKENS; t += LANES) {
            const Bits both = *(const Bits *)(from + 2 * t);
            *(Bits *)(to + t) = both & 0xffff;
            *(Bits *)(to + TOKENS + t) = both >> 16;
        }
        return;
    }
    if (W % 4) {
        memset(to, 0, sizeof(int32_t) * W * TOKENS);
        for (int64_t t = 0; t < n; t++, from += W)
            for (int64_t j = 0; j < W; j++) to[j * TOKENS + t] = from[j];
        return;
    }
    uint64_t fours[MAX_D / 8][TOKENS] ALIGNED;
    if (n < TOKENS) memset(fours, 0, sizeof(uint64_t) * W / 4 * TOKENS);
    switch (W) {  /* usual ones are faster if they are known */
    case 4: by_four(from, 4, n, fours); break;
    case 8: by_four(from, 8, n, fours); break;
    case 16: by_four(from, 16, n, fours); break;
    default: by_four(from, W, n, fours);
    }
    for (int64_t j = 0; j < W / 4; j++)
        for (int64_t t = 0; t < TOKENS; t += LANES) {
            Longs even = *(const Longs *)(fours[j] + t), odd = *(const Longs *)(fours[j] + t + LANES / 2);
            Bits low = (Bits)((even & 0xffffffff) | (odd << 32));
            Bits high = (Bits)((even >> 32) | (odd >> 32 << 32));
            Bits *at = (Bits *)(to + j * 4 * TOKENS + t);
            at[0] = low & 0xffff;
            at[TOKENS / LANES] = low >> 16;
            at[2 * TOKENS / LANES] = high & 0xffff;
            at[3 * TOKENS / LANES] = high >> 16;
        }
}

/* Words of n tokens from `row` on, tokens along lanes; behind them is room for those of the planes. */
static void key_words(const Cached *k, const Digit *digit, int64_t b, int64_t h, int64_t row, int64_t n,
                      int32_t *to) {
    const int64_t W = digit->planes[1];
    const Cut cut = digit->cut;
    int32_t *wide = W ? to + digit->words * TOKENS : to, *narrow = wide + digit->planes[0] * TOKENS;
    for (int p = 0; p < 2 && digit->planes[p]; p++)
        transposed(plane(k, digit, b, h, row, p), digit->planes[p], n, p ? narrow : wide);
    if (!W) return;
    for (int64_t word = 0, piece = 0; word < digit->words; piece++) {
        const int shift = (int)(piece / 2 * cut.wide), narrow_shift = (int)(piece * cut.narrow);
        for (int64_t j = 0; j < W; j++, word++)
            for (int t = 0; t < TOKENS; t += LANES) {
                const Bits *high = (const Bits *)(wide + (piece % 2 * W + j) * TOKENS + t);
                const Bits *low = (const Bits *)(narrow + j * TOKENS + t);
                *(Bits *)(to + word * TOKENS + t) = joined(cut, *high >> shift, *low >> narrow_shift);
            }
    }
}

/* sums[r][token] = a digit of channels c..end-1 times q[r][channel], TOKENS tokens at once; or, with `add`, more
   by as much. */
INLINE void dot(const int R, const int32_t *words, const Digit *digit, const int64_t D, const float *q, int64_t c,
                int64_t end, int add, float (*sums)[TOKENS]) {
    Floats low[ROWS] = {{0}}, high[ROWS] = {{0}};
    for (int r = 0; add && r < R; r++) low[r] = AT(sums[r]), high[r] = AT(sums[r] + LANES);
    for (int64_t field = c / digit->words, j = c % digit->words; c < end; field++, j = 0) {
        const int32_t mask = (int32_t)digit->masks[field];
        for (const int64_t stop = least(end, c + digit->words - j); c < stop; c++, j++) {
            const Ints *at = (const Ints *)(words + j * TOKENS);
            Floats a = to_floats(at[0] & mask), b = to_floats(at[1] & mask);
            for (int r = 0; r < R; r++) {
                low[r] += a * q[r * D + c];
                high[r] += b * q[r * D + c];
            }
        }
    }
    for (int r = 0; r < R; r++) AT(sums[r]) = low[r], AT(sums[r] + LANES) = high[r];
}

/* Functions of their own, one for each number of rows: inlined together they run out of registers. */
#define ROWS_DOT(R)                                                                                     \
    static __attribute__((noinline)) void dot##R(const int32_t *words, const Digit *digit, int64_t D,   \
                                                 const float *q, int64_t c, int64_t end, int add,       \
                                                 float (*sums)[TOKENS]) {                               \
        dot(R, words, digit, D, q, c, end, add, sums);                                                  \
    }
ROWS_DOT(1) ROWS_DOT(2) ROWS_DOT(3) ROWS_DOT(4)
static void (*const DOT[ROWS])(const int32_t *, const Digit *, int64_t, const float *, int64_t, int64_t, int,
                               float (*)[TOKENS]) = {dot1, dot2, dot3, dot4};

INLINE int64_t order_at(const Tensor *order, int64_t at) {
    return order->dtype == BYTE   ? ((const uint8_t *)order->data)[at]
           : order->dtype == WORD ? ((const int16_t *)order->data)[at]
                                  : ((const int32_t *)order->data)[at];
}

/* Rows of queries as packed tokens have their channels, where no order is another's than the first: `tile` 0. */
static void to_packed(const Cached *x, int64_t b, int64_t h, int64_t tile, int64_t rows, const float *from,
                      float *to) {
    const int64_t first = place(&x->order, b, h, tile);
    float row[MAX_D];
    for (int64_t r = 0; r < rows; r++, from += x->D, to += x->D) {
        memcpy(row, from, sizeof(float) * x->D);
        if (x->rotated) rotate(row, x->D, x->rotated);
        for (int64_t c = 0; c < x->D; c++) to[c] = row[x->order.data ? order_at(&x->order, first + c) : c];
    }
}

/* Adds to scores of n tokens what their raw channels make of them. */
static void exact_scores(const Cached *k, int64_t b, int64_t h, int64_t row, int64_t n, const float *q,
                         int64_t rows, float *scores) {
    float room[MAX_D];
    for (int64_t t = 0; t < n; t++) {
        const float *key = load(&k->exact, place(&k->exact, b, h, row + t), k->raw, room);
        for (int64_t r = 0; r < rows; r++) {
            const float *own = q + (r + 1) * k->D - k->raw;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < k->raw; c++) sum += own[c] * key[c];
            scores[r * BLOCK + t] += sum;
        }
    }
}

static void packed_scores(const Cached *k, int64_t b, int64_t h, int64_t row, int64_t n, const float *q,
                          int64_t rows, float *scores) {
    const int64_t D = k->D, G = k->group, span = k->per_channel ? D : G, columns = D / span;
    const float *given = q;
    float ordered[MAX_ROWS * MAX_D];
    float scaled[MAX_DIGITS][MAX_ROWS * MAX_D], power[MAX_DIGITS][MAX_D], offset[MAX_ROWS * MAX_GROUPS];
    float step[MAX_GROUPS][TOKENS], zero[MAX_GROUPS][TOKENS], ones[MAX_D], room[2 * MAX_D];
    int32_t words[MAX_DIGITS][MAX_D / 2 * TOKENS] ALIGNED, masks[MAX_D];
    for (int64_t i = 0; i < k->digits; i++) constants(k->digit + i, D, masks, power[i]);
    for (int64_t c = 0; c < D; c++) ones[c] = 1;
    if (!k->per_channel)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < D; c += LANES) {
                for (int64_t i = 0; i < k->digits; i++)
                    AT(scaled[i] + r * D + c) = AT(q + r * D + c) * AT(power[i] + c);
                if (c % G == 0) offset[r * columns + c / G] = product(q + r * D + c, ones, G);
            }
    for (int64_t done = 0, count, group = -1; done < n; done += count, row += count) {
        count = at_once(k, row, n - done);
        if (k->per_channel) {
            count = least(count, G - row % G);
            if (row / G != group) {
                group = row / G;
                const float *s, *z;
                numbers(k, b, h, group, D, room, &s, &z);
                if (k->tile) to_packed(k, b, h, row / k->tile, rows, given, ordered), q = ordered;
                for (int64_t r = 0; r < rows; r++) {
                    offset[r] = product(q + r * D, z, D);
                    for (int64_t i = 0; i < k->digits; i++)
                        for (int64_t c = 0; c < k->digit[i].channels; c += LANES)
                            AT(scaled[i] + r * D + c) = AT(q + r * D + c) * (AT(s + c) * AT(power[i] + c));
                }
            }
        } else {
            by_group(k, b, h, row, columns, count, step, zero);
        }
        for (int64_t i = 0; i < k->digits; i++) key_words(k, k->digit + i, b, h, row, count, words[i]);
        for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t R = least(ROWS, rows - r);
            float sums[ROWS][TOKENS] = {{0}};
            for (int64_t g = 0; g < columns; g++) {
                float parts[ROWS][TOKENS];
                const int64_t c = g * span;
                int64_t i = 0;
                do {
                    const int64_t end = least(c + span, k->digit[i].channels);
                    DOT[R - 1](words[i], k->digit + i, D, scaled[i] + r * D, c, end, i > 0, parts);
                } while (++i < k->digits);
                for (int64_t i = 0; i < R; i++)
                    for (int t = 0; t < TOKENS; t += LANES) {
                        const float plus = offset[(r + i) * columns + g];
                        if (k->per_channel)
                            AT(sums[i] + t) = AT(parts[i] + t) + plus;
                        else
                            AT(sums[i] + t) += AT(parts[i] + t) * AT(step[g] + t) + plus * AT(zero[g] + t);
                    }
            }
            for (int64_t i = 0; i < R; i++)
                memcpy(scores + (r + i) * BLOCK + done, sums[i], sizeof(float) * count);
        }
        if (k->raw) exact_scores(k, b, h, row, count, q, rows, scores + done);
    }
}

static void raw_scores(const Tensor *x, int64_t D, int64_t at, int64_t n, const float *q, int64_t rows,
                       float *scores) {
    float room[MAX_D];
    for (int64_t t = 0; t < n; t++) {
        const float *key = load(x, at + t * x->token, D, room);
        for (int64_t r = 0; r < rows; r++) scores[r * BLOCK + t] = product(q + r * D, key, D);
    }
}

/* sums[r][u] = codes of n tokens times w[r][token], for U vectors of channels that lie `next` apart. */
INLINE void weigh(const int R, const int U, const int32_t *lanes, int64_t stride, int64_t next,
                  const int32_t *masks, int64_t n, const float *w, int64_t w_stride, Floats (*sums)[2]) {
    Floats sum[ROWS][2] = {{{0}}};
    for (int64_t t = 0; t < n; t++)
        for (int u = 0; u < U; u++) {
            const Ints *words = (const Ints *)(lanes + t * stride + u * next);
            Floats code = to_floats(*words & *(const Ints *)(masks + u * LANES));
            for (int r = 0; r < R; r++) sum[r][u] += code * w[r * w_stride + t];
        }
    for (int r = 0; r < R; r++)
        for (int u = 0; u < U; u++) sums[r][u] = sum[r][u];
}

#define ROWS_WEIGH(R, U)                                                                               \
    static __attribute__((noinline)) void weigh##R##U(const int32_t *lanes, int64_t stride, int64_t next, \
                                                      const int32_t *masks, int64_t n, const float *w,  \
                                                      int64_t w_stride, Floats (*sums)[2]) {            \
        weigh(R, U, lanes, stride, next, masks, n, w, w_stride, sums);                                 \
    }
ROWS_WEIGH(1, 1) ROWS_WEIGH(2, 1) ROWS_WEIGH(3, 1) ROWS_WEIGH(4, 1)
ROWS_WEIGH(1, 2) ROWS_WEIGH(2, 2) ROWS_WEIGH(3, 2) ROWS_WEIGH(4, 2)
static void (*const WEIGH[2][ROWS])(const int32_t *, int64_t, int64_t, const int32_t *, int64_t,
                                    const float *, int64_t, Floats (*)[2]) = {
    {weigh11, weigh21, weigh31, weigh41}, {weigh12, weigh22, weigh32, weigh42}};

/* Words of n tokens, again and again until `stride` of them are filled. */
INLINE void repeated(const uint16_t *from, int64_t next, const int64_t W, const int64_t stride, int64_t n,
                     int32_t *to) {
    for (int64_t t = 0; t < n; t++, from += next, to += stride)
        for (int64_t c = 0; c < stride; c += W)
            for (int64_t j = 0; j < W; j++) to[c + j] = from[j];
}

/* The same for any W, whole times; may write up to LANES - 1 words more. */
static void spread(const uint16_t *from, int64_t next, int64_t W, int64_t stride, int64_t n, int32_t *to) {
    uint16_t row[MAX_D / 2 + LANES];
    switch (stride == 16 ? W : 0) {
    case 4: repeated(from, next, 4, 16, n, to); return;
    case 8: repeated(from, next, 8, 16, n, to); return;
    case 16: repeated(from, next, 16, 16, n, to); return;
    }
    for (int64_t t = 0; t < n; t++, from += next, to += stride) {
        const uint16_t *words = W % LANES ? (const uint16_t *)memcpy(row, from, sizeof(*row) * W) : from;
        for (int64_t c = 0; c + W <= stride; c += W)
            for (int64_t j = 0; j < W; j += LANES)
                *(Ints *)(to + c + j) = __builtin_convertvector(*(const Shorts *)(words + j), Ints);
    }
}

/* Words of n tokens from `row` on, each token's again and again until `stride` of them are filled;
   behind them is room for as many. */
static void value_words(const Cached *v, const Digit *digit, int64_t b, int64_t h, int64_t row, int64_t n,
                        int64_t stride, int32_t *to) {
    int32_t *narrow = to + TOKENS * stride, shifts[2][MAX_D];
    for (int p = 0; p < 2 && digit->planes[p]; p++) {
        /* gcc that knows this to be W shuffles many tokens together, which is slower */
        const int64_t next = v->digits > 1 || digit->planes[1] ? digit->planes[p] : v->codes.token;
        spread(plane(v, digit, b, h, row, p), next, digit->planes[p], stride, n, p ? narrow : to);
    }
    if (!digit->planes[1]) return;
    const Cut cut = digit->cut;
    for (int p = 0; p < 2; p++)
        for (int64_t c = 0, shift = 0; c < stride; shift = (shift + (p ? cut.narrow : cut.wide)) % 16)
            for (int64_t j = 0; j < digit->planes[p]; j++) shifts[p][c++] = (int32_t)shift;
    for (int64_t at = 0; at < n * stride; at += stride)
        for (int64_t c = 0; c < stride; c += LANES) {
            Bits *high = (Bits *)(to + at + c), *low = (Bits *)(narrow + at + c);
            *high = joined(cut, *high >> *(Bits *)(shifts[0] + c), *low >> *(Bits *)(shifts[1] + c));
        }
}

static void packed_values(const Cached *v, int64_t b, int64_t h, int64_t row, int64_t n, const float *weights,
                          int64_t rows, float *out) {
    const int64_t D = v->D, G = v->group, span = v->per_channel ? D : G, columns = D / span;
    int32_t lanes[MAX_DIGITS][2 * TOKENS * MAX_D + LANES] ALIGNED, masks[MAX_DIGITS][MAX_D];
    int64_t strides[MAX_DIGITS];
    float power[MAX_DIGITS][MAX_D], room[2 * MAX_D], step[MAX_GROUPS][TOKENS], zero[MAX_GROUPS][TOKENS];
    for (int64_t j = 0; j < v->digits; j++) {
        /* words are repeated to fill whole vectors, at worst to one for each channel */
        const int64_t W = v->digit[j].words, channels = (v->digit[j].channels + 15) / 16 * 16;
        strides[j] = 16 % W == 0 ? 16 : W % LANES == 0 ? W : channels;
        constants(v->digit + j, D, masks[j], power[j]);
    }
    for (int t = 0; t < TOKENS; t++) step[0][t] = zero[0][t] = 1;  /* stays so if scales are per channel */
    for (int64_t done = 0, count; done < n; done += count, row += count) {
        count = at_once(v, row, n - done);
        const float *s = 0, *z = 0;
        if (v->per_channel) {
            count = least(count, G - row % G);
            numbers(v, b, h, row / G, D, room, &s, &z);
        } else {
            by_group(v, b, h, row, columns, count, step, zero);
        }
        for (int64_t j = 0; j < v->digits; j++)
            value_words(v, v->digit + j, b, h, row, count, strides[j], lanes[j]);
        for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t R = least(ROWS, rows - r);
            float w[ROWS * MAX_GROUPS * TOKENS], offset[ROWS][MAX_GROUPS];
            for (int64_t i = 0; i < R; i++) {
                float given[TOKENS] = {0};
                memcpy(given, weights + (r + i) * BLOCK + done, sizeof(float) * count);
                for (int64_t g = 0; g < columns; g++) {
                    Floats sum = {0};
                    for (int t = 0; t < TOKENS; t += LANES) {
                        AT(w + (i * columns + g) * TOKENS + t) = AT(given + t) * AT(step[g] + t);
                        sum += AT(given + t) * AT(zero[g] + t);
                    }
                    offset[i][g] = sum_of(sum);
                }
            }
            for (int64_t j = 0; j < v->digits; j++) {
                const int64_t stride = strides[j], next = stride == LANES ? 0 : LANES;  /* one vector serves all */
                const float once = j == 0;  /* offsets are added with the first digit, also where it has no codes */
                const int64_t last = j ? v->digit[j].channels : D;
                for (int64_t c = 0, U; c < last; c += U * LANES) {
                    const int64_t g = c / span;
                    const int32_t *l = lanes[j] + c % stride, *m = masks[j] + c;
                    const float *by = w + g * TOKENS;
                    Floats sums[ROWS][2];
                    U = c + 2 * LANES <= (g + 1) * span && c % stride + next < stride ? 2 : 1;
                    WEIGH[U - 1][R - 1](l, stride, next, m, count, by, columns * TOKENS, sums);
                    for (int64_t i = 0; i < R; i++)
                        for (int64_t u = 0, d = c; u < U; u++, d += LANES) {
                            Floats sum = sums[i][u] * AT(power[j] + d);
                            float *to = out + (r + i) * D + d;
                            if (v->per_channel)
                                AT(to) += sum * AT(s + d) + once * offset[i][0] * AT(z + d);
                            else
                                AT(to) += sum + once * offset[i][g];
                        }
                }
            }
        }
    }
}

static void raw_values(const Tensor *x, int64_t D, int64_t at, int64_t n, const float *weights, int64_t rows,
                       float *out) {
    float room[MAX_D];
    for (int64_t t = 0; t < n; t++) {
        const float *value = load(x, at + t * x->token, D, room);
        for (int64_t r = 0; r < rows; r++) {
            const float w = weights[r * BLOCK + t];
            for (int64_t c = 0; c < D; c += LANES) AT(out + r * D + c) += w * AT(value + c);
        }
    }
}

/* Positions first..last-1: scores of the queries `of`; or, with `add`, their weighted sum, added to `of`. */
static void over_runs(const Cached *x, int64_t b, int64_t h, int64_t first, int64_t last, const Rows of,
                      int64_t rows, float *scores, const int add) {
    for (const Run *run = x->runs; run < x->runs + x->count; run++) {
        const int64_t begin = most(first, run->first), n = least(last, run->last) - begin;
        if (n <= 0) continue;
        const int64_t slot = run->slot + begin - run->first;
        float *at = scores + begin - first;
        const Tensor *raw = run->kind == FRESH ? &x->fresh : &x->residual;
        if (run->kind == PACKED && add)
            packed_values(x, b, h, slot, n, at, rows, of.packed);
        else if (run->kind == PACKED)
            packed_scores(x, b, h, slot, n, of.packed, rows, at);
        else if (add)
            raw_values(raw, x->D, place(raw, b, h, slot), n, at, rows, of.raw);
        else
            raw_scores(raw, x->D, place(raw, b, h, slot), n, of.raw, rows, at);
    }
}

static void apply_mask(const Call *call, int64_t b, int64_t h, int64_t row, int64_t first, int64_t n,
                       float *scores) {
    const Tensor *m = &call->mask;
    const int64_t at = place(m, b, h * call->group + row / call->Lq, row % call->Lq) + first;
    if (m->dtype == BOOL) {
        const uint8_t *attends = (const uint8_t *)m->data + at;
        for (int64_t t = 0; t < n; t++) scores[t] = attends[t] ? scores[t] : -__builtin_inff();
    } else {
        float room[BLOCK];
        const float *added = load(m, at, n, room);
        for (int64_t t = 0; t < n; t++) scores[t] += added[t];
    }
}

INLINE int is_apart(const Cached *x) { return x->rotated || (x->order.data && !x->tile); }

/* Adds rows of sums, in the channels of packed tokens, to others in those of raw ones. */
static void from_packed(const Cached *x, int64_t b, int64_t h, int64_t rows, const float *from, float *to) {
    const int64_t first = place(&x->order, b, h, 0);
    float row[MAX_D] = {0};
    for (int64_t r = 0; r < rows; r++, from += x->D, to += x->D) {
        for (int64_t c = 0; c < x->D; c++) row[x->order.data ? order_at(&x->order, first + c) : c] = from[c];
        if (x->rotated) rotate(row, x->D, x->rotated);
        for (int64_t c = 0; c < x->D; c++) to[c] += row[c];
    }
}

/* Partial result: per row the best score, the sum of weights, and Dv weighted sums. */
static void task(const Work *work, int64_t index) {
    const Call *call = work->call;
    const int64_t part = index % work->splits, bh = index / work->splits, b = bh / call->H, h = bh % call->H;
    const int64_t rows = call->group * call->Lq, D = call->keys.D, Dv = call->values.D;
    float q[MAX_ROWS * MAX_D], scores[MAX_ROWS * BLOCK], room[MAX_D];
    float *best = work->partial + index * rows * (Dv + 2), *total = best + rows, *out = total + rows;
    float packed_q[MAX_ROWS * MAX_D], packed_out[MAX_ROWS * MAX_D];
    const Rows queries = {q, is_apart(&call->keys) ? packed_q : q};
    const Rows sums = {out, is_apart(&call->values) ? packed_out : out};
    memset(sums.packed, 0, sizeof(float) * rows * Dv);
    memset(out, 0, sizeof(float) * rows * Dv);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = place(&call->query, b, h * call->group + r / call->Lq, r % call->Lq);
        const float *from = load(&call->query, at, D, room);
        for (int64_t c = 0; c < D; c++) q[r * D + c] = from[c] * (float)call->scale;
        best[r] = LOWEST, total[r] = 0;
    }
    if (queries.packed != q) to_packed(&call->keys, b, h, 0, rows, q, packed_q);
    const int64_t end = work->blocks * (part + 1) / work->splits;
    for (int64_t block = work->blocks * part / work->splits; block < end; block++) {
        const int64_t at = work->begin + block * BLOCK;
        const int64_t first = most(0, at), last = least(call->length, at + BLOCK), n = last - first;
        over_runs(&call->keys, b, h, first, last, queries, rows, scores, 0);
        for (int64_t r = 0; r < rows; r++) {
            float *s = scores + r * BLOCK, highest = best[r];
            if (call->softcap > 0)
                for (int64_t t = 0; t < n; t += LANES) AT(s + t) = capped(AT(s + t), (float)call->softcap);
            if (call->mask.data) apply_mask(call, b, h, r, first, n, s);
            for (int64_t t = n; t % LANES; t++) s[t] = -__builtin_inff();
#pragma omp simd reduction(max : highest)
            for (int64_t t = 0; t < n; t++) highest = s[t] > highest ? s[t] : highest;
            Floats sum = {0};
            for (int64_t t = 0; t < n; t += LANES) sum += AT(s + t) = exponential(AT(s + t) - highest);
            const float shrink = exponential1(best[r] - highest);
            best[r] = highest, total[r] = total[r] * shrink + sum_of(sum);
            for (int64_t c = r * Dv; c < (r + 1) * Dv; c += LANES) AT(out + c) *= shrink;
            if (sums.packed != out)
                for (int64_t c = r * Dv; c < (r + 1) * Dv; c += LANES) AT(packed_out + c) *= shrink;
        }
        over_runs(&call->values, b, h, first, last, sums, rows, scores, 1);
    }
    if (sums.packed != out) from_packed(&call->values, b, h, rows, packed_out, out);
}

static void tasks(void *argument) {
    Work *work = (Work *)argument;
    for (int64_t i; (i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->tasks;) task(work, i);
}

/* Whether all that an order names are channels. */
static int is_ordered(const Call *call, const Cached *x) {
    int wrong = 0;
    for (int64_t i = 0; x->order.data && i < call->B * call->H * x->orders; i++) {
        const int64_t head = i / x->orders;
        const int64_t first = place(&x->order, head / call->H, head % call->H, i % x->orders);
        for (int64_t c = 0; c < x->D; c++) wrong |= (uint64_t)order_at(&x->order, first + c) >= (uint64_t)x->D;
    }
    return !wrong;
}

/* 0, 1 if there was no memory, or 2 if an order of channels names others. */
int kvmix_attend(const Call *call) {
    if (!is_ordered(call, &call->keys) || !is_ordered(call, &call->values)) return 2;
    const int64_t heads = call->B * call->H, rows = call->group * call->Lq, Dv = call->values.D;
    const int64_t partial = rows * (Dv + 2), begin = call->origin % BLOCK ? call->origin % BLOCK - BLOCK : 0;
    const int64_t blocks = (call->length - begin + BLOCK - 1) / BLOCK;
    Work work = {.call = call, .begin = begin, .blocks = blocks, .splits = 1};
    /* to wake the other threads costs as much as some 2^16 elements */
    const int is_small = heads * call->length * (call->keys.D + Dv) < 1 << 16;
    const int alone = call->threads == 1 || !GOMP_parallel || is_small;
    if (!alone) work.splits = most(1, least(work.blocks, 8 * call->threads / heads));
    work.tasks = heads * work.splits;
    work.partial = (float *)malloc(sizeof(float) * work.tasks * partial);
    if (!work.partial) return 1;
    if (alone) tasks(&work);
    else GOMP_parallel(tasks, &work, (unsigned)call->threads, 0);

    for (int64_t i = 0; i < heads * rows; i++) {
        const float *first = work.partial + i / rows * work.splits * partial + i % rows;
        const int64_t head = i / rows % call->H * call->group + i % rows / call->Lq;
        float highest = LOWEST, total = 0, *out = call->out + i * Dv;
        if (call->sinks && call->sinks[head] > LOWEST) highest = call->sinks[head];
        for (int64_t s = 0; s < work.splits; s++)
            if (first[s * partial] > highest) highest = first[s * partial];
        if (call->sinks) total = exponential1(call->sinks[head] - highest);
        memset(out, 0, sizeof(float) * Dv);
        for (int64_t s = 0; s < work.splits; s++) {
            const float *best = first + s * partial, *sums = best - i % rows + 2 * rows + i % rows * Dv;
            const float factor = exponential1(*best - highest);
            total += factor * best[rows];
            for (int64_t c = 0; c < Dv; c++) out[c] += factor * sums[c];
        }
        /* a query that may attend to nothing gets zeros */
        for (int64_t c = 0; c < Dv; c++) out[c] /= total == 0 ? 1 : total;
        if (call->sums) call->sums[2 * i] = highest, call->sums[2 * i + 1] = total;
    }
    free(work.partial);
    return 0;
}
