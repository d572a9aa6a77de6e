#include "arena.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace galley {

Arena::Arena(size_t bytes) : size_((bytes + (2u << 20) - 1) / (2u << 20) * (2u << 20)) {
#if defined(__linux__)
    // Over-allocate by one huge page and start at a boundary, so that huge pages can be used from the first byte on.
    const size_t huge = 2u << 20;
    void* p = mmap(nullptr, size_ + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t at = ((uintptr_t)p + huge - 1) & ~(uintptr_t)(huge - 1);
    if (at > (uintptr_t)p) munmap(p, at - (uintptr_t)p);
    const size_t tail = (uintptr_t)p + huge - at;
    if (tail) munmap((void*)(at + size_), tail);
    data_ = (uint8_t*)at;
    madvise(data_, size_, MADV_HUGEPAGE);  // advice: a refusal costs speed, nothing else
#else
    data_ = (uint8_t*)std::aligned_alloc(4096, size_);
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, size_);
#endif
}

Arena::~Arena() {
#if defined(__linux__)
    munmap(data_, size_);
#else
    std::free(data_);
#endif
}

}  // namespace galley
