// What the kernel table offers of attention: pages of either kind, rows cut into tiles.
#pragma once

namespace GALLEY_NS {

static void write_kv(Kv type, uint8_t* page, int slot, const float* k, const float* v, int head_dim) {
    type == Kv::f16 ? write_f16(page, slot, k, v, head_dim) : write_i8(page, slot, k, v, head_dim);
}

template <int R, Kv T, bool AHEAD>
static void attend_rows(const Span& a, int r0) {
    if constexpr (T == Kv::f16) attend_f16<R, AHEAD>(a, r0);
    else attend_i8<R, AHEAD>(a, r0);
}

template <Kv T, bool AHEAD>
static void attend_span(const Span& a) {
    const Tiles tiles(a.rows, kQueryRows);
    static_assert(kQueryRows <= kMostRows);
    for (int i = 0; i < tiles.count; i++) {
        switch (tiles.size(i)) {
            case 1: attend_rows<1, T, AHEAD>(a, tiles.start(i)); break;
            case 2: attend_rows<2, T, AHEAD>(a, tiles.start(i)); break;
#define GALLEY_TILE(R) \
    case R: if constexpr (kQueryRows >= R) attend_rows<R, T, AHEAD>(a, tiles.start(i)); break;
            GALLEY_TILE(3) GALLEY_TILE(4) GALLEY_TILE(5) GALLEY_TILE(6)
#undef GALLEY_TILE
        }
    }
}

static void attend(const Span& a) {
    const bool once = a.rows <= kQueryRows;  // several tiles find the pages in the cache after the first
    if (a.type == Kv::int8) once ? attend_span<Kv::int8, true>(a) : attend_span<Kv::int8, false>(a);
    else if (a.rows > 2 * kQueryRows) attend_wide(a);
    else once ? attend_span<Kv::f16, true>(a) : attend_span<Kv::f16, false>(a);
}

}  // namespace GALLEY_NS
