// Bytes in the order in which they came: what RPC has received and not read, or written and not sent.
#ifndef GPT2_TVM_SUPPORT_RING_BUFFER_H_
#define GPT2_TVM_SUPPORT_RING_BUFFER_H_

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace tvm {
namespace support {

// The bytes lie in one piece, so a callback sees all of them at once; the room in front of them is used again.
class RingBuffer {
 public:
  size_t bytes_available() const { return bytes_.size() - begin_; }
  // Make room for `size` bytes in all.
  void Reserve(size_t size) { bytes_.reserve(begin_ + size); }

  void Read(void* data, size_t size) {
    TVM_FFI_ICHECK_GE(bytes_available(), size);
    if (size != 0) std::memcpy(data, bytes_.data() + begin_, size);
    Drop(size);
  }
  void Write(const void* data, size_t size) {
    const char* from = static_cast<const char*>(data);
    bytes_.insert(bytes_.end(), from, from + size);
  }
  // `send(data, size)` returns how many bytes it took; so does this.
  template <typename Send>
  size_t ReadWithCallback(Send send, size_t size) {
    size_t taken = send(bytes_.data() + begin_, std::min(size, bytes_available()));
    Drop(taken);
    return taken;
  }
  // `receive(data, size)` fills at most `size` bytes and returns how many; so does this.
  template <typename Receive>
  size_t WriteWithCallback(Receive receive, size_t size) {
    size_t end = bytes_.size();
    bytes_.resize(end + size);
    size_t got = receive(bytes_.data() + end, size);
    bytes_.resize(end + got);
    return got;
  }

 private:
  void Drop(size_t size) {
    begin_ += size;
    if (begin_ == bytes_.size()) {
      bytes_.clear();
      begin_ = 0;
    } else if (begin_ > bytes_.size() / 2) {
      bytes_.erase(bytes_.begin(), bytes_.begin() + static_cast<std::ptrdiff_t>(begin_));
      begin_ = 0;
    }
  }

  std::vector<char> bytes_;
  size_t begin_ = 0;
};

}  // namespace support
}  // namespace tvm

#endif  // GPT2_TVM_SUPPORT_RING_BUFFER_H_
