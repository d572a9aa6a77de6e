// What this machine can do right now: core-to-core round trip, read bandwidth of a buffer, int8 peak.
//
//   g++ -O3 -march=native -std=c++20 -pthread probe.cpp -o probe
//   probe MEGABYTES SECONDS THREADS   -> one line of JSON
//
// Virtual cores are moved between chiplets and neighbours come and go within seconds, so a figure without
// this beside it cannot be compared with another: the harness runs it before and after every pair of samples.
//
// read_gb_s: every thread reads its own contiguous part of one buffer, sequentially, 64 bytes a load.
// int8_gop_s: independent dot-product accumulators in registers; one multiply-add counts as two operations.
// Instruction: vpdpbusd on zmm, on ymm, or vpmaddubsw on ymm, the best this compiler target has; "none" else.

#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <algorithm>

#include <sched.h>
#include <sys/mman.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// CPUs this process may use, so that a restricted affinity mask is respected.
std::vector<int> allowed_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    std::vector<int> cpus;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
        }
    }
    return cpus;
}

void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

typedef long long Line __attribute__((vector_size(64)));

double read_lines(const char* base, size_t bytes) {
    Line sum[8] = {};
    size_t offset = 0;
    for (; offset + 512 <= bytes; offset += 512) {
        for (int i = 0; i < 8; i++) sum[i] += *reinterpret_cast<const Line*>(base + offset + 64 * i);
    }
    for (int i = 1; i < 8; i++) sum[0] += sum[i];
    asm volatile("" : : "m"(sum[0]));  // keep the loads
    return static_cast<double>(offset);
}

#if defined(__AVX512VNNI__)
constexpr const char* kInt8 = "vpdpbusd-zmm";
double dot_int8(long rounds) {
    __m512i acc[16] = {};
    const __m512i x = _mm512_set1_epi8(1), y = _mm512_set1_epi8(1);
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc[i]) : "v"(x), "v"(y));
    }
    return static_cast<double>(rounds) * 16 * 128;
}
#elif defined(__AVX2__)
#if defined(__AVXVNNI__)
constexpr const char* kInt8 = "vpdpbusd-ymm";
#else
constexpr const char* kInt8 = "vpmaddubsw-ymm";
#endif
double dot_int8(long rounds) {
    __m256i acc[12] = {};
    const __m256i x = _mm256_set1_epi8(1), y = _mm256_set1_epi8(1);
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
#if defined(__AVXVNNI__)
            asm volatile("{vex} vpdpbusd %2, %1, %0" : "+x"(acc[i]) : "x"(x), "x"(y));
#else
            // Multiply only, no accumulation into 32 bits: an upper bound.
            asm volatile("vpmaddubsw %2, %1, %0" : "=x"(acc[i]) : "x"(x), "x"(y));
#endif
        }
    }
    return static_cast<double>(rounds) * 12 * 64;
}
#else
constexpr const char* kInt8 = "none";
double dot_int8(long) { return 0; }
#endif

// Runs `work(thread)` -> amount on `threads` pinned threads at once; returns amount per second.
template <typename Work>
double together(const std::vector<int>& cpus, int threads, Work work) {
    std::barrier gate(threads);
    std::vector<double> amount(threads), start(threads), end(threads);
    const auto origin = Clock::now();
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; t++) {
        pool.emplace_back([&, t] {
            pin(cpus[t % cpus.size()]);
            gate.arrive_and_wait();
            start[t] = seconds_since(origin);
            amount[t] = work(t);
            end[t] = seconds_since(origin);
        });
    }
    for (auto& thread : pool) thread.join();
    double total = 0;
    for (double a : amount) total += a;
    return total / (*std::max_element(end.begin(), end.end()) - *std::min_element(start.begin(), start.end()));
}

template <typename Work>
double median_of_three(const std::vector<int>& cpus, int threads, Work work) {
    double rates[3];
    for (double& rate : rates) rate = together(cpus, threads, work);
    std::sort(rates, rates + 3);
    return rates[1];
}

// Two threads hand one cache line back and forth; nanoseconds for there and back.
double roundtrip_ns(const std::vector<int>& cpus, double seconds) {
    alignas(64) static std::atomic<long> ball{0};
    alignas(64) static std::atomic<bool> done{false};
    ball = 0;
    done = false;
    std::thread other([&] {
        pin(cpus[1]);
        for (long expect = 1; !done.load(std::memory_order_relaxed);) {
            if (ball.load(std::memory_order_acquire) == expect) {
                ball.store(expect + 1, std::memory_order_release);
                expect += 2;
            }
        }
    });
    pin(cpus[0]);
    const auto start = Clock::now();
    long turns = 0;
    while (turns % 4096 != 0 || turns == 0 || seconds_since(start) < seconds) {
        ball.store(2 * turns + 1, std::memory_order_release);
        while (ball.load(std::memory_order_acquire) != 2 * turns + 2) {
        }
        turns++;
    }
    const double elapsed = seconds_since(start);
    done = true;
    other.join();
    return elapsed * 1e9 / static_cast<double>(turns);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: probe MEGABYTES SECONDS THREADS\n");
        return 2;
    }
    const double megabytes = std::atof(argv[1]), slice = std::atof(argv[2]);
    const int threads = std::atoi(argv[3]);
    if (megabytes <= 0 || slice <= 0 || threads < 1) {
        std::fprintf(stderr, "probe: all three numbers must be positive\n");
        return 2;
    }
    const std::vector<int> cpus = allowed_cpus();
    if (static_cast<int>(cpus.size()) < threads) {
        std::fprintf(stderr, "probe: %d threads asked for, %zu CPUs allowed\n", threads, cpus.size());
        return 2;
    }
    const size_t bytes = static_cast<size_t>(megabytes * 1e6) & ~size_t{4095};
    void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        std::perror("probe: mmap");
        return 1;
    }
    madvise(map, bytes, MADV_HUGEPAGE);
    std::memset(map, 1, bytes);
    const char* base = static_cast<const char*>(map);

    const auto read_with = [&](int n) {
        const size_t part = (bytes / n) & ~size_t{4095};
        return median_of_three(cpus, n, [&, part](int t) {
                   const auto start = Clock::now();
                   double done = 0;
                   do {
                       done += read_lines(base + part * t, part);
                   } while (seconds_since(start) < slice);
                   return done;
               }) * 1e-9;
    };
    const auto int8_with = [&](int n) {
        return median_of_three(cpus, n, [&](int) {
                   const auto start = Clock::now();
                   double done = 0;
                   do {
                       done += dot_int8(20000);
                   } while (seconds_since(start) < slice && done > 0);
                   return done;
               }) * 1e-9;
    };
    const double trip = cpus.size() > 1 ? roundtrip_ns(cpus, slice) : 0.0;
    const double read_one = read_with(1), read_all = read_with(threads);
    const double int8_one = int8_with(1), int8_all = int8_with(threads);
    std::printf(
        "{\"roundtrip_ns\": %.1f, \"megabytes\": %.1f, \"threads\": %d, \"read_1_gb_s\": %.2f, "
        "\"read_gb_s\": %.2f, \"int8_1_gop_s\": %.1f, \"int8_gop_s\": %.1f, \"int8_op\": \"%s\"}\n",
        trip, bytes / 1e6, threads, read_one, read_all, int8_one, int8_all, kInt8);
    return 0;
}
