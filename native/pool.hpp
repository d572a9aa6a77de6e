// A persistent pool of threads that run one function together and meet at barriers inside it.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace galley {

class Pool {
   public:
    // `threads` counts the caller, who takes part as thread 0.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    int size() const { return threads_; }

    // Calls f(thread) on every thread and returns when all have finished.
    void run(const std::function<void(int)>& f);

    // Inside run: all threads wait for each other.
    void barrier();

   private:
    void work(int id);
    int threads_;
    std::vector<std::thread> workers_;
    const std::function<void(int)>* job_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int> running_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
};

// Processors this process may run on.
int affinity_count();

}  // namespace galley
