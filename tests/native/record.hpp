// Results of kernels, bit by bit, under names.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

namespace galley {

class Record {
   public:
    template <class T>
    void put(const std::string& name, const T* values, size_t count) {
        static_assert(std::is_trivially_copyable_v<T>);
        auto& to = results_[name];
        const size_t at = to.size();
        to.resize(at + count * sizeof(T));
        std::memcpy(to.data() + at, values, count * sizeof(T));
    }
    template <class T>
    void put(const std::string& name, const T& value) { put(name, &value, 1); }

    const std::map<std::string, std::vector<uint8_t>>& results() const { return results_; }

    // FNV-1a (Fowler, Noll and Vo) over the bytes of one name.
    static uint64_t digest(const std::vector<uint8_t>& bytes) {
        uint64_t h = 0xcbf29ce484222325u;
        for (const uint8_t b : bytes) h = (h ^ b) * 0x100000001b3u;
        return h;
    }

   private:
    std::map<std::string, std::vector<uint8_t>> results_;
};

// Numbers that are the same on every machine: no distribution of the standard library is.
class Numbers {
   public:
    explicit Numbers(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint32_t word() {
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;  // xorshift64 (Marsaglia, 2003)
        return (uint32_t)(state_ >> 32);
    }
    int below(int n) { return (int)(word() % (uint32_t)n); }
    float uniform(float low, float high) { return low + (high - low) * ((float)(word() >> 8) * 0x1p-24f); }
    std::vector<float> many(size_t n, float low, float high) {
        std::vector<float> v(n);
        for (float& x : v) x = uniform(low, high);
        return v;
    }

   private:
    uint64_t state_;
};

}  // namespace galley
