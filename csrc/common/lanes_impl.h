// Vectors of kLanes floats, of which all inner loops are written. Included by the files of one instruction set inside
// its namespace and after its target pragma; includes nothing itself.
// (No include guard: each file includes it once, in its own namespace.)

template <int kLanes>
struct Lanes {
  typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  static Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
  static void save(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
};
