// Large memory for weights and keys and values.
#pragma once
#include <cstddef>
#include <cstdint>

namespace galley {

// Zeroed pages from the system, given back on destruction; huge where the kernel agrees.
class Arena {
   public:
    explicit Arena(size_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

   private:
    uint8_t* data_ = nullptr;
    size_t size_;
};

}  // namespace galley
