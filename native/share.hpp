// Small things the files of the model share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace galley {

// Share `i` of `n` of `total` things, in order.
inline std::pair<int, int> share(int total, int i, int n) {
    return {(int)((int64_t)total * i / n), (int)((int64_t)total * (i + 1) / n)};
}

template <class V>
void grow(V& v, size_t n) {
    if (v.size() < n) v.resize(n);
}

}  // namespace galley
