// A pool of threads that stands in for ONNX Runtime's: thread sanitizers see all of it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

#include "../compute.h"

namespace adapterx::harness {

class Threads {
 public:
  explicit Threads(size_t count) {
    for (size_t i = 1; i < count; ++i) others_.emplace_back([this] { serve(); });
  }

  ~Threads() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
      round_.fetch_add(1);
    }
    woken_.notify_all();
    for (std::thread& other : others_) other.join();
  }

  // Each thread takes its share of neighbouring units, as ONNX Runtime's do.
  Pool pool() {
    return {this, [](void* self, void (*task)(void*, size_t), void* job, size_t count) {
              static_cast<Threads*>(self)->run(task, job, count);
            }};
  }

 private:
  void run(void (*task)(void*, size_t), void* job, size_t count) {
    {
      const std::lock_guard lock(mutex_);
      task_ = task;
      job_ = job;
      count_ = count;
      shares_ = others_.size() + 1;
      next_.store(0);
      busy_.store(others_.size());
      round_.fetch_add(1);
    }
    woken_.notify_all();
    work();
    while (busy_.load()) {
    }
  }

  void work() {
    for (size_t share; (share = next_.fetch_add(1)) < shares_;)
      for (size_t i = count_ * share / shares_; i < count_ * (share + 1) / shares_; ++i) task_(job_, i);
  }

  void serve() {
    size_t seen = 0;
    for (;;) {
      for (int turn = 0; turn < 20000 && round_.load() == seen; ++turn) {
      }
      {
        std::unique_lock lock(mutex_);
        woken_.wait(lock, [&] { return round_.load() != seen; });
        seen = round_.load();
        if (over_) return;
      }
      work();
      busy_.fetch_sub(1);
    }
  }

  std::vector<std::thread> others_;
  std::mutex mutex_;
  std::condition_variable woken_;
  std::atomic<size_t> round_{0}, next_{0}, busy_{0};
  void (*task_)(void*, size_t) = nullptr;
  void* job_ = nullptr;
  size_t count_ = 0, shares_ = 1;
  bool over_ = false;
};

}  // namespace adapterx::harness
