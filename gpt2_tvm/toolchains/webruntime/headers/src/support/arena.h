// Memory that is given out piece by piece and taken back at once.
#ifndef GPT2_TVM_SUPPORT_ARENA_H_
#define GPT2_TVM_SUPPORT_ARENA_H_

#include <cstddef>
#include <memory>
#include <type_traits>
#include <vector>

namespace tvm {
namespace support {

class Arena {
 public:
  // Room for `count` values of T, not initialised, until RecycleAll.
  template <typename T>
  T* allocate_(int count = 1) {
    static_assert(std::is_trivially_destructible_v<T> && alignof(T) <= alignof(std::max_align_t));
    size_t bytes = sizeof(T) * static_cast<size_t>(count);
    pieces_.emplace_back(new std::max_align_t[bytes / sizeof(std::max_align_t) + 1]);
    return reinterpret_cast<T*>(pieces_.back().get());
  }
  void RecycleAll() { pieces_.clear(); }

 private:
  std::vector<std::unique_ptr<std::max_align_t[]>> pieces_;
};

}  // namespace support
}  // namespace tvm

#endif  // GPT2_TVM_SUPPORT_ARENA_H_
