#include "pool.hpp"

#include <chrono>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace galley {

namespace {

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins a little, then gives the processor away between looks: with fewer processors than threads (or another busy
// thread on ours) a pure spin would starve the very thread that is waited for.
template <class Ready>
void wait_spinning(Ready ready) {
    for (int i = 0; !ready(); i++) {
        if (i < 4000) relax();
        else std::this_thread::yield();
    }
}

constexpr auto kSpin = std::chrono::microseconds(300);  // between two steps a worker stays awake this long

}  // namespace

int affinity_count() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const int n = (int)std::thread::hardware_concurrency();
    return n > 0 ? n : 1;
}

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
    for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& w : workers_) w.join();
}

void Pool::run(const std::function<void(int)>& f) {
    if (threads_ == 1) return f(0);
    job_ = &f;
    running_.store(threads_ - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1);  // sequentially consistent, so that a worker about to sleep is seen below
    if (sleepers_.load() > 0) epoch_.notify_all();
    f(0);
    wait_spinning([&] { return running_.load(std::memory_order_acquire) == 0; });
}

void Pool::barrier() {
    if (threads_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    wait_spinning([&] { return phase_.load(std::memory_order_acquire) != phase; });
}

void Pool::work(int id) {
    uint32_t seen = 0;
    for (;;) {
        const auto until = std::chrono::steady_clock::now() + kSpin;
        for (int i = 0; epoch_.load(std::memory_order_acquire) == seen; i++) {
            relax();
            if (i % 64 == 63) {
                std::this_thread::yield();
                if (std::chrono::steady_clock::now() > until) {
                    sleepers_.fetch_add(1);
                    epoch_.wait(seen);  // futex; returns at once if the epoch has moved
                    sleepers_.fetch_sub(1);
                }
            }
        }
        seen = epoch_.load(std::memory_order_acquire);
        if (stop_.load()) return;
        (*job_)(id);
        running_.fetch_sub(1, std::memory_order_acq_rel);
    }
}

}  // namespace galley
