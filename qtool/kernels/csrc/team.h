// Threads that work on one call together.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace qtool {

// Lets threads wait for each other: first briefly awake, then asleep, so that an oversubscribed CPU is not wasted.
class Barrier {
 public:
  void wait(int size);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<std::uint32_t> round_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// One thread's view of those that share a piece of work.
struct Crew {
  int index = 0, size = 1;
  Barrier* barrier = nullptr;

  void wait() const {
    if (size > 1) barrier->wait(size);
  }
  // This thread's share of `count` things.
  int begin(int count) const { return static_cast<int>(std::int64_t{count} * index / size); }
  int end(int count) const { return static_cast<int>(std::int64_t{count} * (index + 1) / size); }
};

// Runs `job(context, crew)` on up to `threads` threads, the caller being one, and returns when all are done: on torch's
// OpenMP threads where torch is loaded, else on workers that sleep between calls (and of which a child of fork makes its
// own), where calls from several threads take turns.
void run_together(int threads, void (*job)(void* context, const Crew& crew), void* context);

// Called in a child of fork, by itself where the library is loaded when it happens.
void after_fork();

template <class Job>
void together(int threads, Job& job) {
  run_together(threads, [](void* context, const Crew& crew) { (*static_cast<Job*>(context))(crew); }, &job);
}

}  // namespace qtool
