// The kernel table: what a step needs from the processor, one implementation per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace galley {

// How a matrix is laid out after packing. Rows go in pairs of panels (2 x 16 rows); columns in pairs of groups
// (2 x 32), so that every record is a whole number of cache lines and a thread reads one sequential stream:
//   q4:    [group 2][panel 2][4 x 64 B nibbles]  then f16 d[group 2][panel 2][16] (then f16 m, same shape)
//   q5:    as q4, and [group 2][panel 2][64 B] of fifth bits between nibbles and scales; q5m with minima
//   q6:    as q4, and [group 2][panel 2][half 2][64 B] of fifth and sixth bits; f16 d[group 2][panel 2][half 2][16]: one
//          scale per 16 columns
//   q8:    [group 2][panel 2][8 x 64 B int8]     then the same scales as q4
//   q8m, q8s16: as q8, with the scales of q4m and of q6: what q5m and q6 become when many tokens wait (`wider`)
// In a 64-byte vector, 32-bit lane r holds four consecutive columns of row r; a q4 byte holds column c in its low
// and column c + 16 in its high nibble.
//   f16, bf16, f32: [column][panel 2][16], columns not padded
enum class Layout : int { q4, q4m, q5, q5m, q6, q8, q8m, q8s16, f16, bf16, f32 };

constexpr int kPanel = 16, kPair = 32, kGroup = 32, kSuper = 64;

// What the record of a super-block (64 columns of a pair of panels) of a quantised layout consists of.
struct Super {
    int nibbles, above;    // bytes of nibbles, 0 where integers are bytes; bits above the nibble
    bool minimum, halves;  // a minimum for each scale; a scale for each half group
    constexpr explicit Super(Layout l)
        : nibbles(l < Layout::q8 ? 1024 : 0), above(l == Layout::q6 ? 2 : l == Layout::q5 || l == Layout::q5m ? 1 : 0),
          minimum(l == Layout::q4m || l == Layout::q5m || l == Layout::q8m), halves(l == Layout::q6 || l == Layout::q8s16) {}
    constexpr int quants() const { return nibbles ? nibbles + 256 * above : 2048; }
    constexpr int scales() const { return minimum || halves ? 256 : 128; }
    constexpr int bytes() const { return quants() + scales(); }
};
// The layout of bytes that has the same scales; itself for others than q5, q5m and q6.
constexpr Layout wider(Layout l) {
    return l == Layout::q5 ? Layout::q8 : l == Layout::q5m ? Layout::q8m : l == Layout::q6 ? Layout::q8s16 : l;
}

struct Matrix {
    Layout layout = Layout::f32;
    int rows = 0, cols = 0;   // logical
    int pairs = 0;            // ceil(rows / 32)
    int supers = 0;           // ceil(cols / 64), quantised layouts
    size_t pair_stride = 0;   // bytes between pairs; gate and up pairs alternate in one stream
    const uint8_t* data = nullptr;
    bool quantised() const { return layout < Layout::f16; }
};

// 32 activations of one token as int8, with one scale per half (16 columns), and beside them what a kernel needs to turn
// its integer sums into floats, so that it only loads it: one cache line. One scale per 16 rather than 32 values halves
// the divergence from float32 (docs/ACCURACY.md).
struct alignas(64) Piece {
    int8_t q[32];
    float low, high;      // scales of columns 0..15 and 16..31
    float high_nibble;    // the second over what the kernels multiply high nibbles by
    float sum;            // of the 32 values, for weights with a minimum
    int32_t bias4[2];     // what the sums with unsigned q4 weights start from: -8 times the sum of each half (and times
                          // the factor of high nibbles)
    int32_t bias8[2];     // the same for int8 weights, whose offset depends on the instruction set
};
static_assert(sizeof(Piece) == 64);

// Activations of T tokens. Quantised form: pieces in tiles so that a micro-kernel walks them in order,
// [tile][group][token]; columns are padded with zeros to a multiple of 64.
struct Acts {
    int tokens = 0, cols = 0, groups = 0;  // groups is even
    const float* x = nullptr;              // [tokens][ldx], always there
    size_t ldx = 0;
    Piece* pieces = nullptr;
    // Room of the calling thread for a pair of panels in the layout `wider`, for q5, q5m and q6.
    uint8_t* room = nullptr;
};

// Tokens are cut into ceil(T / limit) tiles whose sizes differ by at most one.
struct Tiles {
    int count, base, extra;
    Tiles(int tokens, int limit) : count((tokens + limit - 1) / limit), base(count ? tokens / count : 0), extra(count ? tokens % count : 0) {}
    int start(int i) const { return i * base + (i < extra ? i : extra); }
    int size(int i) const { return base + (i < extra); }
};

// How keys and values are stored. A page holds kPage tokens of one kv head: f16 K as [head_dim][16] and V as
// [16][head_dim]; or the same in int8, then float scales of K [16] and of V [16], one a token.
enum class Kv : int { f16, int8 };
constexpr int kMostGroup = 64;  // query heads that may share a kv head
constexpr int kPage = 16;   // tokens in a page
constexpr int kSpan = 256;  // positions whose softmax is taken together; spans are joined in order. Fixed, at absolute
                            // positions: so the result is the same whoever computes the spans, and with whom
inline size_t page_bytes(Kv type, int head_dim) {
    return type == Kv::f16 ? (size_t)kPage * head_dim * 4 : (size_t)kPage * head_dim * 2 + kPage * 2 * sizeof(float);
}

// A span's part of the attention of one row: floats acc[head_dim], then the highest score and the sum of exponentials.
inline int part_floats(int head_dim) { return head_dim + 16; }

// Query rows of one kv head against one span of positions.
struct Span {
    const float* q;          // [rows][head_dim], rotated and scaled
    int rows, head_dim;
    Kv type;
    const uint8_t* kv;       // arena of this layer and head: page of block b at kv + b * stride
    size_t stride;
    const int32_t* blocks;   // of this span
    int positions;           // of this span that are there, at most kSpan
    const int* visible;      // [rows] how many of them the row sees; may be <= 0 or above `positions`
    float* parts;            // [rows][part_floats]
    float* scratch;          // span_scratch(head_dim) floats
};

struct Draw {
    float temperature, top_p, min_p, repetition, frequency, presence;
    int top_k, lane;
    uint64_t seed;
    int64_t position;
    const int32_t* bias_ids; const float* bias_values; int biases;
    const int32_t* ban_ids; int bans;
    const int32_t* seen_ids; const int32_t* seen_counts; int seen;
    const uint32_t* mask;  // bit id & 31 of word id >> 5 is set where the id is allowed; null for no mask
};

struct Kernels {
    const char* name;
    int max_tile;
    // Rows 32*pair .. +31 of W times the tokens of tiles [tile0, tile1) of X, to (or added to) out[token * ldo + 0..31].
    void (*linear)(const Matrix& w, const Acts& x, int pair, int tile0, int tile1, float* out, size_t ldo, bool add);
    // Quantises tokens [t0, t1) of x into tile order.
    void (*quantise)(const Acts& x, int t0, int t1);
    void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
    void (*silu_mul)(const float* gate, const float* up, int n, float* out);
    // Rotates one head in place: c, s are cos and sin of the rope_dim/2 angles.
    void (*rope)(float* head, const float* c, const float* s, int rope_dim, bool interleaved);
    void (*write_kv)(Kv type, uint8_t* page, int slot, const float* k, const float* v, int head_dim);
    void (*attend)(const Span& a);
    // state = state joined with the part of the next span; state and part may be any parts of the same row.
    void (*join)(float* state, const float* part, int head_dim);
    // out[head_dim] = acc / sum.
    void (*finish)(const float* state, int head_dim, float* out);
    // Highest logit, lowest id on ties.
    int (*argmax)(const float* x, int n);
    // log(sum(exp(x))) and how many entries beat x[id] (ties: lower ids).
    float (*log_sum_exp)(const float* x, int n);
    int (*draw)(const float* logits, int n, const Draw& d, float* scratch);
    // `rounds` times as many independent dot products of bytes as it takes to keep the processor busy, adding to `sink`.
    // Returns the multiplications and additions done.
    double (*dots)(long rounds, int32_t& sink);
};

constexpr int kMostRows = 6;    // query rows of a tile
constexpr int kWideBlock = 48;  // rows that pass over pages turned into floats together
// Floats: scores of a tile and as many rows of two bytes a number; or scores of a block and four pages of keys.
inline size_t span_scratch(int head_dim) {
    const size_t bytes = kMostRows * (kSpan + (size_t)(head_dim > kSpan ? head_dim : kSpan) / 2);
    const size_t wide = kWideBlock * kSpan + (size_t)4 * kPage * head_dim;
    return bytes > wide ? bytes : wide;
}

namespace avx512vnni { extern const Kernels table; }
namespace avx512vl { extern const Kernels table; }
namespace avx2vnni { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace neon { extern const Kernels table; }
namespace portable { extern const Kernels table; }

}  // namespace galley
