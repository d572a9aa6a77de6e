#include "pack.hpp"

#include <cstring>
#include <stdexcept>

#include "half.hpp"

namespace galley {

namespace {

uint16_t u16(const uint8_t* p) { uint16_t x; std::memcpy(&x, p, 2); return x; }
uint32_t u32(const uint8_t* p) { uint32_t x; std::memcpy(&x, p, 4); return x; }

// 32 values of a row as integers with one scale and one minimum: value = d * q + m. Q6_K has a second scale, d2, for
// the last sixteen.
struct Group {
    int8_t q[32];
    float d, d2, m;
};

// Scale and minimum j (0..7) of Q4_K and Q5_K: six bits each, packed in twelve bytes (formats: ggml-quants).
void scale_min(const uint8_t* b, int j, int& sc, int& m) {
    if (j < 4) {
        sc = b[j] & 63, m = b[j + 4] & 63;
    } else {
        sc = (b[j + 4] & 15) | ((b[j - 4] >> 6) << 4);
        m = (b[j + 4] >> 4) | ((b[j] >> 6) << 4);
    }
}

// Group g (32 columns) of a row.
void read_group(Type t, const uint8_t* row, int g, Group& o) {
    o.m = 0;
    switch (t) {
        case Type::q4_0: {
            const uint8_t* b = row + (size_t)g * 18;
            o.d = half_to_float(u16(b));
            for (int i = 0; i < 16; i++) o.q[i] = (int8_t)((b[2 + i] & 15) - 8), o.q[i + 16] = (int8_t)((b[2 + i] >> 4) - 8);
            break;
        }
        case Type::q4_1: {
            const uint8_t* b = row + (size_t)g * 20;
            o.d = half_to_float(u16(b)), o.m = half_to_float(u16(b + 2));
            for (int i = 0; i < 16; i++) o.q[i] = (int8_t)(b[4 + i] & 15), o.q[i + 16] = (int8_t)(b[4 + i] >> 4);
            break;
        }
        case Type::q5_0: {
            const uint8_t* b = row + (size_t)g * 22;
            const uint32_t h = u32(b + 2);
            o.d = half_to_float(u16(b));
            for (int i = 0; i < 16; i++) {
                o.q[i] = (int8_t)(((b[6 + i] & 15) | ((h >> i & 1) << 4)) - 16);
                o.q[i + 16] = (int8_t)(((b[6 + i] >> 4) | ((h >> (i + 16) & 1) << 4)) - 16);
            }
            break;
        }
        case Type::q5_1: {
            const uint8_t* b = row + (size_t)g * 24;
            const uint32_t h = u32(b + 4);
            o.d = half_to_float(u16(b)), o.m = half_to_float(u16(b + 2));
            for (int i = 0; i < 16; i++) {
                o.q[i] = (int8_t)((b[8 + i] & 15) | ((h >> i & 1) << 4));
                o.q[i + 16] = (int8_t)((b[8 + i] >> 4) | ((h >> (i + 16) & 1) << 4));
            }
            break;
        }
        case Type::q8_0: {
            const uint8_t* b = row + (size_t)g * 34;
            o.d = half_to_float(u16(b));
            std::memcpy(o.q, b + 2, 32);
            break;
        }
        case Type::q4_k: case Type::q5_k: {
            const bool five = t == Type::q5_k;
            const uint8_t* b = row + (size_t)(g / 8) * (five ? 176 : 144);
            const int j = g % 8;
            int sc, m;
            scale_min(b + 4, j, sc, m);
            o.d = half_to_float(u16(b)) * (float)sc, o.m = -half_to_float(u16(b + 2)) * (float)m;
            const uint8_t* q = b + (five ? 48 : 16) + (j / 2) * 32;
            const uint8_t* h = b + 16;
            for (int i = 0; i < 32; i++) {
                int v = j & 1 ? q[i] >> 4 : q[i] & 15;
                if (five) v |= (h[i] >> j & 1) << 4;
                o.q[i] = (int8_t)v;
            }
            break;
        }
        case Type::q6_k: {
            const uint8_t* b = row + (size_t)(g / 8) * 210;
            const int half = (g % 8) / 4, part = g % 4;  // 128 columns, then 32
            const uint8_t *ql = b + half * 64 + (part & 1) * 32, *qh = b + 128 + half * 32;
            const int8_t* sc = (const int8_t*)(b + 192) + half * 8 + part * 2;
            const float d = half_to_float(u16(b + 208));
            for (int i = 0; i < 32; i++) {
                const int lo = part < 2 ? ql[i] & 15 : ql[i] >> 4;
                o.q[i] = (int8_t)((lo | ((qh[i] >> (2 * part) & 3) << 4)) - 32);
            }
            o.d = d * (float)sc[0], o.d2 = d * (float)sc[1];
            break;
        }
        default: throw std::logic_error("not a block type");
    }
}

}  // namespace

bool type_known(int id) {
    switch ((Type)id) {
        case Type::f32: case Type::f16: case Type::bf16: case Type::q4_0: case Type::q4_1: case Type::q5_0: case Type::q5_1:
        case Type::q8_0: case Type::q4_k: case Type::q5_k: case Type::q6_k: return true;
    }
    return false;
}

int type_block(Type t) {
    switch (t) {
        case Type::f32: case Type::f16: case Type::bf16: return 1;
        case Type::q4_k: case Type::q5_k: case Type::q6_k: return 256;
        default: return 32;
    }
}

size_t type_bytes(Type t) {
    switch (t) {
        case Type::f32: return 4;
        case Type::f16: case Type::bf16: return 2;
        case Type::q4_0: return 18;
        case Type::q4_1: return 20;
        case Type::q5_0: return 22;
        case Type::q5_1: return 24;
        case Type::q8_0: return 34;
        case Type::q4_k: return 144;
        case Type::q5_k: return 176;
        case Type::q6_k: return 210;
    }
    throw std::logic_error("unknown type");
}

size_t row_bytes(Type t, int cols) { return (size_t)cols / type_block(t) * type_bytes(t); }

void dequantise_row(Type t, const uint8_t* row, int cols, float* out) {
    switch (t) {
        case Type::f32: std::memcpy(out, row, (size_t)cols * 4); return;
        case Type::f16: for (int i = 0; i < cols; i++) out[i] = half_to_float(u16(row + 2 * i)); return;
        case Type::bf16: for (int i = 0; i < cols; i++) out[i] = bf16_to_float(u16(row + 2 * i)); return;
        default: break;
    }
    Group g;
    for (int i = 0; i < cols / 32; i++) {
        read_group(t, row, i, g);
        const float tail = t == Type::q6_k ? g.d2 : g.d;
        for (int k = 0; k < 32; k++) out[32 * i + k] = (k < 16 ? g.d : tail) * (float)g.q[k] + g.m;
    }
}

Layout layout_for(Type t) {
    switch (t) {
        case Type::f32: return Layout::f32;
        case Type::f16: return Layout::f16;
        case Type::bf16: return Layout::bf16;
        case Type::q4_0: return Layout::q4;
        case Type::q4_1: case Type::q4_k: return Layout::q4m;
        case Type::q5_0: return Layout::q5;
        case Type::q5_1: case Type::q5_k: return Layout::q5m;
        case Type::q6_k: return Layout::q6;
        case Type::q8_0: return Layout::q8;
    }
    throw std::logic_error("unknown type");
}

size_t pair_bytes(Layout l, int cols) {
    const size_t supers = ((size_t)cols + kSuper - 1) / kSuper;
    switch (l) {
        case Layout::q4: case Layout::q4m: case Layout::q5: case Layout::q5m: case Layout::q6:
        case Layout::q8: case Layout::q8m: case Layout::q8s16: return supers * Super(l).bytes();
        case Layout::f16: case Layout::bf16: return (size_t)cols * kPair * 2;
        case Layout::f32: return (size_t)cols * kPair * 4;
    }
    throw std::logic_error("unknown layout");
}

void pack_pair(Layout l, const Type types[32], const uint8_t* const rows[32], int cols, uint8_t* out) {
    if (l == Layout::f32 || l == Layout::f16 || l == Layout::bf16) {
        const size_t size = l == Layout::f32 ? 4 : 2;
        for (int r = 0; r < kPair; r++)
            for (int k = 0; k < cols; k++) {
                uint8_t* to = out + ((size_t)k * kPair + r) * size;
                if (rows[r]) std::memcpy(to, rows[r] + (size_t)k * size, size);
                else std::memset(to, 0, size);
            }
        return;
    }
    const Super super(l);
    const size_t record = super.bytes();
    // what makes the numbers unsigned, as nibbles and the bits above them are
    const int bias = l == Layout::q4 ? 8 : l == Layout::q5 ? 16 : l == Layout::q6 ? 32 : 0;
    const int groups = cols / kGroup, supers = (cols + kSuper - 1) / kSuper;
    std::memset(out, 0, record * supers);
    Group g;
    for (int i = 0; i < groups; i++) {
        uint8_t* at = out + (size_t)(i / 2) * record;
        uint8_t *above = at + super.nibbles, *scales = at + super.quants();
        for (int r = 0; r < kPair; r++) {
            if (!rows[r]) continue;  // scales stay zero
            const int panel = r / kPanel, lane = r % kPanel, half = i & 1;
            read_group(types[r], rows[r], i, g);
            if (!super.nibbles) {
                uint8_t* q = at + half * 1024 + panel * 512 + lane * 4;
                for (int c = 0; c < 32; c++) q[(c / 4) * 64 + c % 4] = (uint8_t)g.q[c];
            }
            for (int c = 0; c < 32 && super.nibbles; c++) {
                const int v = g.q[c] + bias, h = c / 16, quad = c % 16 / 4, j = lane * 4 + c % 4;
                at[half * 512 + panel * 256 + quad * 64 + j] |= (uint8_t)((v & 15) << 4 * h);
                if (super.above == 1) above[half * 128 + panel * 64 + j] |= (uint8_t)(v >> 4 << (4 * h + quad));
                if (super.above == 2) above[half * 256 + panel * 128 + h * 64 + j] |= (uint8_t)(v >> 4 << 2 * quad);
            }
            uint16_t* s = (uint16_t*)scales;
            if (super.halves) {
                s[half * 64 + panel * 32 + lane] = float_to_half(g.d);
                s[half * 64 + panel * 32 + 16 + lane] = float_to_half(g.d2);
            } else {
                s[half * 32 + panel * 16 + lane] = float_to_half(g.d);
                if (super.minimum) s[64 + half * 32 + panel * 16 + lane] = float_to_half(g.m);
            }
        }
    }
}

}  // namespace galley
