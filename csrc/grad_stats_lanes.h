// One chunk on one CPU core. Included once per instruction set, with LANES (a namespace), TARGET (an attribute), HALVES
// (four 16-bit integers in memory to 32 bits), WIDEN (four floats to doubles) and LARGER (of four integers each)
// defined: GCC lowers vector types by the attribute of the function that names them, but does not find the best
// instruction for these three.
//
// Squares are summed in double: the square of a float is exact there, so nothing overflows or vanishes, and every
// instruction set gives the same bits (for double too, as the compiler may not fuse multiply and add). Sixteen lanes
// keep the adders busy; they are added in a fixed order.

namespace ava::LANES {

#define INLINE TARGET inline __attribute__((always_inline))

INLINE i32x4 choose(i32x4 condition, i32x4 yes, i32x4 no) { return (condition & yes) | (~condition & no); }
INLINE f32x4 as_float(i32x4 bits) { return (f32x4)bits; }
INLINE i32x4 as_bits(f32x4 values) { return (i32x4)values; }

INLINE f32x4 load(const float* from) {
  f32x4 values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

INLINE f32x4 load(const Bfloat16* from) { return as_float(HALVES(from) << 16); }

INLINE f32x4 load(const Float16* from) {
  const i32x4 bits = HALVES(from);
  // Exponent and mantissa where a float has them; the product corrects the bias, and makes subnormals normal.
  const i32x4 scaled = as_bits(as_float((bits & 0x7fff) << 13) * 0x1p112f);
  const i32x4 special = (i32x4)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return as_float(scaled | special | (bits & 0x8000) << 16);
}

INLINE f64x4 load(const double* from) {
  f64x4 values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

INLINE void store(float* to, f32x4 values) { std::memcpy(to, &values, sizeof values); }
INLINE void store(double* to, f64x4 values) { std::memcpy(to, &values, sizeof values); }

INLINE void store_halves(void* to, i32x4 bits) {
  const u16x4 halves = __builtin_convertvector(bits, u16x4);
  std::memcpy(to, &halves, sizeof halves);
}

// Both round to nearest, ties to even, and keep NaN a NaN.
INLINE void store(Bfloat16* to, f32x4 values) {
  const i32x4 bits = as_bits(values);
  const i32x4 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_halves(to, choose((bits & 0x7fffffff) > 0x7f800000, i32x4{} + 0x7fc0, rounded) & 0xffff);
}

INLINE void store(Float16* to, f32x4 values) {
  const i32x4 all = as_bits(values), bits = all & 0x7fffffff;
  const i32x4 normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  // Below 2^-14 a float16 counts steps of 2^-24, and so does a float between 0.5 and 1.
  const i32x4 subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000;
  i32x4 half = choose(bits < (113 << 23), subnormal, normal);
  half = choose(bits >= (143 << 23), i32x4{} + 0x7c00, half);
  half = choose(bits > 0x7f800000, i32x4{} + 0x7e00, half);
  store_halves(to, half | ((all >> 16) & 0x8000));
}

// What sixteen elements at a time add up to.
struct Sums {
  f64x4 squares[4];
  i32x4 largest[2];    // magnitudes as bits: integers order them as floats do, with NaN above all
  i64x4 largest64[2];  // for double
};

INLINE void add(Sums& sums, int part, f32x4 values) {
  const f64x4 wide = WIDEN(values);
  sums.squares[part] += wide * wide;
  const i32x4 bits = as_bits(values) & 0x7fffffff;
  i32x4& largest = sums.largest[part % 2];
  largest = LARGER(bits, largest);
}

INLINE void add(Sums& sums, int part, f64x4 values) {
  sums.squares[part] += values * values;
  const i64x4 bits = (i64x4)values & 0x7fffffffffffffff;
  i64x4& largest = sums.largest64[part % 2];
  const i64x4 more = bits > largest;
  largest = (more & bits) | (~more & largest);
}

template <typename T>
INLINE void add_sixteen(Sums& sums, const T* x) {
  for (int part = 0; part < 4; ++part) add(sums, part, load(x + 4 * part));
}

INLINE bool is_finite(f32x4 values, int lane) { return (as_bits(values)[lane] & 0x7f800000) != 0x7f800000; }
INLINE bool is_finite(f64x4 values, int lane) {
  return ((i64x4)values)[lane] << 1 >> 53 != -1;  // an exponent of ones alone shifts to −1
}

template <typename T>
TARGET Partial stats(const T* x, int64_t size) {
  Sums sums{};
  const int64_t whole = size / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) add_sixteen(sums, x + i);
  T rest[16] = {};  // zeros change nothing
  if (size > whole) {
    std::memcpy(rest, x + whole, (size - whole) * sizeof(T));
    add_sixteen(sums, rest);
  }

  Partial partial{};
  const f64x4 squares = (sums.squares[0] + sums.squares[1]) + (sums.squares[2] + sums.squares[3]);
  partial.squares = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  int32_t largest = 0;
  int64_t largest64 = 0;
  for (int lane = 0; lane < 8; ++lane) {
    largest = std::max(largest, sums.largest[lane / 4][lane % 4]);
    largest64 = std::max(largest64, int64_t{sums.largest64[lane / 4][lane % 4]});
  }
  float narrow;
  std::memcpy(&narrow, &largest, sizeof narrow);
  const double wide = narrow;
  std::memcpy(&partial.largest, sizeof(T) == 8 ? static_cast<const void*>(&largest64) : &wide, sizeof wide);

  if (partial.largest >= 0x7ff0000000000000) {  // rare, so only now is it worth counting
    for (int64_t i = 0; i < whole; i += 4) {
      for (int lane = 0; lane < 4; ++lane) partial.nonfinite += !is_finite(load(x + i), lane);
    }
    for (int64_t i = 0; i < 16; i += 4) {
      for (int lane = 0; lane < 4; ++lane) partial.nonfinite += !is_finite(load(rest + i), lane);
    }
  }
  return partial;
}

template <typename T, typename C>
TARGET void scale(T* x, int64_t size, C coefficient) {
  const int64_t whole = size / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4) store(x + i, load(x + i) * coefficient);
  if (size > whole) {
    T rest[4] = {};
    std::memcpy(rest, x + whole, (size - whole) * sizeof(T));
    store(rest, load(rest) * coefficient);
    std::memcpy(x + whole, rest, (size - whole) * sizeof(T));
  }
}

TARGET Partial stats(const Span& span, int64_t begin, int64_t size) {
  switch (span.type) {
    case FLOAT32: return stats(static_cast<const float*>(span.data) + begin, size);
    case FLOAT64: return stats(static_cast<const double*>(span.data) + begin, size);
    case FLOAT16: return stats(static_cast<const Float16*>(span.data) + begin, size);
    default: return stats(static_cast<const Bfloat16*>(span.data) + begin, size);
  }
}

TARGET void scale(const Span& span, int64_t begin, int64_t size, double coefficient) {
  switch (span.type) {
    case FLOAT32: return scale(static_cast<float*>(span.data) + begin, size, static_cast<float>(coefficient));
    case FLOAT64: return scale(static_cast<double*>(span.data) + begin, size, coefficient);
    case FLOAT16: return scale(static_cast<Float16*>(span.data) + begin, size, static_cast<float>(coefficient));
    default: return scale(static_cast<Bfloat16*>(span.data) + begin, size, static_cast<float>(coefficient));
  }
}

#undef INLINE

}  // namespace ava::LANES

#undef LANES
#undef TARGET
#undef HALVES
#undef WIDEN
#undef LARGER
