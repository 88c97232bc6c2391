// Text helpers.
#ifndef GPT2_TVM_SUPPORT_UTILS_H_
#define GPT2_TVM_SUPPORT_UTILS_H_

#include <cstring>
#include <string>

namespace tvm {
namespace support {

inline bool StartsWith(const std::string& text, const char* prefix) {
  return text.compare(0, std::strlen(prefix), prefix) == 0;
}

}  // namespace support
}  // namespace tvm

#endif  // GPT2_TVM_SUPPORT_UTILS_H_
