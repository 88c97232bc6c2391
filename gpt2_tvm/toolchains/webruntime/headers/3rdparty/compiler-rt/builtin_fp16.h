// Widening of small IEEE 754 floats by their bits.
#ifndef GPT2_TVM_BUILTIN_FP16_H_
#define GPT2_TVM_BUILTIN_FP16_H_

#include <cstdint>
#include <cstring>

// bits: a float with `kSourceFraction` bits of fraction in a Source; the result is the same number as a To, whose bits
// lie in a Wide with `kFraction` bits of fraction. Infinities, NaNs and subnormal numbers included.
template <typename Source, typename SourceBits, int kSourceFraction, typename To, typename Wide, int kFraction>
inline To __extendXfYf2__(Source bits) {
  constexpr int kSourceExponent = 8 * static_cast<int>(sizeof(SourceBits)) - 1 - kSourceFraction;
  constexpr int kExponent = 8 * static_cast<int>(sizeof(Wide)) - 1 - kFraction;
  constexpr int kSourceBias = (1 << (kSourceExponent - 1)) - 1;
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr int kSourceMax = (1 << kSourceExponent) - 1;
  constexpr int kMax = (1 << kExponent) - 1;
  constexpr int kShift = kFraction - kSourceFraction;

  Wide raw = static_cast<Wide>(static_cast<SourceBits>(bits));
  Wide fraction = raw & ((Wide{1} << kSourceFraction) - 1);
  int exponent = static_cast<int>(raw >> kSourceFraction) & kSourceMax;
  Wide sign = raw >> (kSourceFraction + kSourceExponent) << (kFraction + kExponent);
  if (exponent == kSourceMax) {
    exponent = kMax;
  } else if (exponent != 0) {
    exponent += kBias - kSourceBias;
  } else if (fraction != 0) {  // subnormal: shift the leading one out of the fraction
    exponent = kBias - kSourceBias + 1;
    while ((fraction >> kSourceFraction) == 0) {
      fraction <<= 1;
      --exponent;
    }
    fraction &= (Wide{1} << kSourceFraction) - 1;
  }
  Wide wide = sign | static_cast<Wide>(exponent) << kFraction | fraction << kShift;
  To result;
  static_assert(sizeof(result) == sizeof(wide));
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

#endif  // GPT2_TVM_BUILTIN_FP16_H_
