// How values lie in a stream: plain data as it is, a container as its 64-bit count and then its elements.
#ifndef GPT2_TVM_SUPPORT_SERIALIZER_H_
#define GPT2_TVM_SUPPORT_SERIALIZER_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tvm {
namespace support {

static_assert(TVM_FFI_IO_NO_ENDIAN_SWAP, "these headers are for little-endian machines, as every wasm engine is");

template <typename T>
struct Serializer {
  static_assert(std::is_trivially_copyable_v<T> && !std::is_pointer_v<T>, "no Serializer for this type");
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const T& value) {
    stream->Write(static_cast<const void*>(&value), sizeof(T));
  }
  static bool Read(Stream* stream, T* value) {
    return stream->Read(static_cast<void*>(value), sizeof(T)) == sizeof(T);
  }
};

// Count, then elements; `append(element)` puts one into the container that is read.
template <typename Element, typename Append>
bool ReadElements(Stream* stream, Append append) {
  uint64_t count;
  if (!Serializer<uint64_t>::Read(stream, &count)) return false;
  for (uint64_t i = 0; i < count; ++i) {
    Element element;
    if (!Serializer<Element>::Read(stream, &element)) return false;
    append(std::move(element));
  }
  return true;
}

template <typename Container>
void WriteElements(Stream* stream, const Container& container) {
  Serializer<uint64_t>::Write(stream, container.size());
  for (const auto& element : container) {
    Serializer<std::decay_t<decltype(element)>>::Write(stream, element);
  }
}

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::string& value) {
    Serializer<uint64_t>::Write(stream, value.size());
    stream->Write(static_cast<const void*>(value.data()), value.size());
  }
  static bool Read(Stream* stream, std::string* value) {
    uint64_t size;
    if (!Serializer<uint64_t>::Read(stream, &size)) return false;
    // In pieces: a damaged count must not become an allocation of its size.
    constexpr uint64_t kPiece = 1 << 20;
    value->clear();
    while (value->size() < size) {
      size_t begin = value->size();
      size_t piece = static_cast<size_t>(std::min<uint64_t>(kPiece, size - begin));
      value->resize(begin + piece);
      if (stream->Read(static_cast<void*>(&(*value)[begin]), piece) != piece) return false;
    }
    return true;
  }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::String& value) {
    Serializer<uint64_t>::Write(stream, value.size());
    stream->Write(static_cast<const void*>(value.data()), value.size());
  }
  static bool Read(Stream* stream, ffi::String* value) {
    std::string text;
    if (!Serializer<std::string>::Read(stream, &text)) return false;
    *value = ffi::String(std::move(text));
    return true;
  }
};

template <typename A, typename B>
struct Serializer<std::pair<A, B>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::pair<A, B>& value) {
    Serializer<std::remove_const_t<A>>::Write(stream, value.first);
    Serializer<B>::Write(stream, value.second);
  }
  static bool Read(Stream* stream, std::pair<A, B>* value) {
    return Serializer<A>::Read(stream, &value->first) && Serializer<B>::Read(stream, &value->second);
  }
};

template <typename T>
struct Serializer<std::vector<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::vector<T>& value) { WriteElements(stream, value); }
  static bool Read(Stream* stream, std::vector<T>* value) {
    value->clear();
    return ReadElements<T>(stream, [value](T&& element) { value->push_back(std::move(element)); });
  }
};

template <typename K, typename V>
struct Serializer<std::unordered_map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::unordered_map<K, V>& value) { WriteElements(stream, value); }
  static bool Read(Stream* stream, std::unordered_map<K, V>* value) {
    value->clear();
    return ReadElements<std::pair<K, V>>(stream,
                                         [value](std::pair<K, V>&& entry) { value->insert(std::move(entry)); });
  }
};

template <typename T>
struct Serializer<ffi::Array<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Array<T>& value) {
    Serializer<uint64_t>::Write(stream, value.size());
    for (const T& element : value) Serializer<T>::Write(stream, element);
  }
  static bool Read(Stream* stream, ffi::Array<T>* value) {
    std::vector<T> elements;
    if (!Serializer<std::vector<T>>::Read(stream, &elements)) return false;
    *value = ffi::Array<T>(elements.begin(), elements.end());
    return true;
  }
};

template <typename K, typename V>
struct Serializer<ffi::Map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Map<K, V>& value) {
    Serializer<uint64_t>::Write(stream, value.size());
    for (const auto& entry : value) {
      Serializer<K>::Write(stream, entry.first);
      Serializer<V>::Write(stream, entry.second);
    }
  }
  static bool Read(Stream* stream, ffi::Map<K, V>* value) {
    uint64_t count;
    if (!Serializer<uint64_t>::Read(stream, &count)) return false;
    ffi::Map<K, V> entries;
    for (uint64_t i = 0; i < count; ++i) {
      K key;
      V mapped;
      if (!Serializer<K>::Read(stream, &key) || !Serializer<V>::Read(stream, &mapped)) return false;
      entries.Set(std::move(key), std::move(mapped));
    }
    *value = std::move(entries);
    return true;
  }
};

}  // namespace support
}  // namespace tvm

#endif  // GPT2_TVM_SUPPORT_SERIALIZER_H_
