#include "probe.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "dispatch.hpp"
#include "arena.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace galley {

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

uint64_t read_all(const uint8_t* p, size_t n) {
    const uint64_t* w = (const uint64_t*)p;
    uint64_t a[8] = {};
    for (size_t i = 0; i + 64 <= n / 8; i += 64)
        for (int j = 0; j < 64; j++) a[j % 8] += w[i + j];
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t read_all_avx512(const uint8_t* p, size_t n) {
    __m512i a[8];
#pragma GCC unroll 8
    for (auto& v : a) v = _mm512_setzero_si512();
    for (size_t i = 0; i + 512 <= n; i += 512)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) a[j] = _mm512_add_epi64(a[j], _mm512_load_si512(p + i + 64 * j));
#pragma GCC unroll 8
    for (int j = 1; j < 8; j++) a[0] = _mm512_add_epi64(a[0], a[j]);
    return (uint64_t)_mm512_reduce_add_epi64(a[0]);
}
#endif

// Runs f on every thread at once for about `seconds`; the sum of what they return, per second.
template <class F>
double rate(int threads, double seconds, F f) {
    std::vector<std::thread> pool;
    std::vector<double> work(threads, 0.0);
    std::atomic<int> ready{0};
    const auto body = [&](int id) {
        ready++;
        while (ready.load() < threads) std::this_thread::yield();
        const auto t0 = Clock::now();
        double done = 0;
        while (since(t0) < seconds) done += f(id);
        work[id] = done / since(t0);
    };
    for (int i = 1; i < threads; i++) pool.emplace_back(body, i);
    body(0);
    for (auto& t : pool) t.join();
    double total = 0;
    for (double w : work) total += w;
    return total;
}

}  // namespace

double probe_bandwidth(int threads, double megabytes, double seconds) {
    const size_t each = (size_t)(megabytes * 1e6) / threads / 4096 * 4096;
    Arena arena(each * threads + 4096);
    for (size_t i = 0; i < arena.size(); i += 4096) arena.data()[i] = 1;  // touched, or every page would be the zero page
    std::atomic<uint64_t> sink{0};
    auto* read = read_all;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) read = read_all_avx512;
#endif
    return rate(threads, seconds, [&](int id) {
               sink += read(arena.data() + each * id, each);
               return (double)each;
           }) / 1e9;
}

double probe_int8(int threads, double seconds) {
    std::atomic<int> sink{0};
    const Kernels* best = isa_find(isa_available().front());
    return rate(threads, seconds, [&](int id) {
               int32_t sum = id;
               const double done = best->dots(100000, sum);
               sink += sum;
               return done;
           }) / 1e9;
}

double probe_roundtrip(double seconds) {
    alignas(64) std::atomic<int> ball{0};
    alignas(64) std::atomic<bool> stop{false};
    std::thread other([&] {
        int seen = 0;
        for (long idle = 0; !stop.load(std::memory_order_relaxed); idle++) {
            const int b = ball.load(std::memory_order_acquire);
            if (b != seen && (b & 1)) seen = b + 1, ball.store(seen, std::memory_order_release), idle = 0;
            if (idle > 100000) std::this_thread::yield(), idle = 0;  // one processor only: let the other side run
        }
    });
    const auto t0 = Clock::now();
    long trips = 0;
    int v = 0;
    while (since(t0) < seconds) {
        for (int i = 0; i < 100; i++, trips++) {
            ball.store(v + 1, std::memory_order_release);
            for (long idle = 0; ball.load(std::memory_order_acquire) != v + 2; idle++)
                if (idle > 100000) std::this_thread::yield(), idle = 0;
            v += 2;
        }
    }
    const double ns = since(t0) / (double)trips * 1e9;
    stop = true;
    other.join();
    return ns;
}

}  // namespace galley
