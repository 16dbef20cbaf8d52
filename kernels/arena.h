// Scratch memory that a thread keeps from call to call, so that a call allocates nothing once its thread has run one like it.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

namespace adapterx {

class Arena {
 public:
  // Not initialised, aligned to a cache line, valid until clear(). Throws std::bad_alloc.
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    if (used_ + bytes > size_) grow(bytes);
    T* taken = reinterpret_cast<T*>(start_ + used_);
    used_ += bytes;
    return taken;
  }

  // Keeps one block, as large as all that was taken; but not for a call far larger than the rest.
  void clear() {
    if (blocks_.size() > 1 || size_ > kKept) {
      const size_t total = total_;
      *this = Arena();
      if (total <= kKept) grow(total);
    }
    used_ = 0;
  }

 private:
  static constexpr size_t kLine = 64, kLeast = size_t{1} << 16, kKept = size_t{1} << 24;

  void grow(size_t bytes) {
    const size_t size = bytes > kLeast ? bytes : kLeast;
    blocks_.emplace_back(new char[size + kLine]);
    const size_t start = reinterpret_cast<size_t>(blocks_.back().get());
    start_ = blocks_.back().get() + (kLine - start % kLine);
    size_ = size;
    used_ = 0;
    total_ += size;
  }

  std::vector<std::unique_ptr<char[]>> blocks_;
  char* start_ = nullptr;
  size_t size_ = 0, used_ = 0, total_ = 0;
};

// This thread's arena for as long as the lease lives. A second lease of the same thread gets an empty arena.
class Scratch {
 public:
  Scratch() : arena_(std::move(kept())) { kept() = Arena(); }
  ~Scratch() {
    try {
      arena_.clear();
      kept() = std::move(arena_);
    } catch (const std::bad_alloc&) {  // then nothing is kept
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Arena& operator*() { return arena_; }

 private:
  static Arena& kept() {
    thread_local Arena arena;
    return arena;
  }
  Arena arena_;
};

}  // namespace adapterx
