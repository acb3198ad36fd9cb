// In place of the class of this name in schedule.h: a stretch behind every array may not be touched, so that an array that
// runs into its neighbour is found.

class Cutter {
 public:
  explicit Cutter(void* memory) : base_(reinterpret_cast<std::uintptr_t>(memory)) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::uintptr_t bytes = static_cast<std::uintptr_t>(count) * sizeof(T), whole = (bytes + 63) / 64 * 64 + 64;
    auto* found = reinterpret_cast<T*>(base_ + used_);
    if (base_ != 0) __asan_poison_memory_region(reinterpret_cast<char*>(base_ + used_ + bytes), whole - bytes);
    used_ += whole;
    return found;
  }
  std::int64_t used() const { return static_cast<std::int64_t>(used_); }

 private:
  std::uintptr_t base_, used_ = 0;
};
