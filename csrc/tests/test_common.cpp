// Handles, the parallel loop and the instruction-set switch.
#include <cstring>
#include <stdexcept>

#include "../common/arena.h"
#include "../common/cpu.h"
#include "../common/parallel.h"
#include "../conv/pack.h"
#include "check.h"
#include "oracle.h"

namespace effkern::test {

TEST(a_handle_with_any_bit_flipped_is_refused) {
  const conv::PackHeader header = conv::make_header(conv::PackKind::Panels, true, 20, 3, 3, 3, 1);
  std::vector<unsigned char> bytes(static_cast<size_t>(conv::handle_bytes(header)));
  std::memcpy(bytes.data(), &header, sizeof header);
  const auto size = static_cast<int64_t>(bytes.size());
  EXPECT(conv::check_header(bytes.data(), size) == nullptr);
  for (size_t bit = 0; bit < 8 * sizeof header; ++bit) {
    bytes[bit / 8] = static_cast<unsigned char>(bytes[bit / 8] ^ (1u << bit % 8));
    EXPECT(conv::check_header(bytes.data(), size) != nullptr, "bit ", bit);
    bytes[bit / 8] = static_cast<unsigned char>(bytes[bit / 8] ^ (1u << bit % 8));
  }
  for (const int64_t wrong : {size - 1, size + 1, int64_t{64}, int64_t{63}, int64_t{0}})
    EXPECT(conv::check_header(bytes.data(), wrong) != nullptr, "size ", wrong);
}

TEST(a_kind_of_pack_that_does_not_fit_the_dimensions_is_refused) {
  for (const bool depthwise : {false, true}) {
    const conv::PackKind wrong = depthwise ? conv::PackKind::Panels : conv::PackKind::Depthwise;
    const conv::PackHeader header = conv::make_header(wrong, false, 8, depthwise ? 1 : 3, 1, 1, depthwise ? 8 : 1);
    std::vector<unsigned char> bytes(static_cast<size_t>(conv::handle_bytes(header)));
    std::memcpy(bytes.data(), &header, sizeof header);
    EXPECT(conv::check_header(bytes.data(), static_cast<int64_t>(bytes.size())) != nullptr, "depthwise ", depthwise);
  }
  // Winograd's transforms are of 3x3 kernels.
  for (const int kernel : {1, 3, 5}) {
    const conv::PackHeader header = conv::make_header(conv::PackKind::Winograd, true, 8, 3, kernel, kernel, 1);
    std::vector<unsigned char> bytes(static_cast<size_t>(conv::handle_bytes(header)));
    std::memcpy(bytes.data(), &header, sizeof header);
    const bool sound = conv::check_header(bytes.data(), static_cast<int64_t>(bytes.size())) == nullptr;
    EXPECT(sound == (kernel == 3), "kernel ", kernel);
  }
}

TEST(an_exception_leaves_the_parallel_loop_with_its_text) {
  std::string what;
  try {
    parallel_for(0, 10, 1, [](int64_t, int64_t) { throw std::runtime_error("from inside"); });
  } catch (const std::runtime_error& error) {
    what = error.what();
  }
  EXPECT(what == "from inside", what);
}

TEST(an_empty_range_calls_nothing) {
  parallel_for(3, 3, 1, [](int64_t, int64_t) { EXPECT(false); });
}

TEST(instruction_sets_have_names_and_unknown_names_are_refused) {
  for (int i = 0; i < kIsas; ++i) EXPECT(isa_from_name(isa_name(static_cast<Isa>(i))) == static_cast<Isa>(i));
  bool refused = false;
  try {
    isa_from_name("avx1024");
  } catch (const std::runtime_error&) {
    refused = true;
  }
  EXPECT(refused);
  for (int i = 0; i < kIsas; ++i) {
    const Isa one = static_cast<Isa>(i);
    bool thrown = false;
    try {
      set_isa(one);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    EXPECT(thrown != isa_available(one), isa_name(one));
    EXPECT(thrown || isa() == one);
  }
}

TEST(an_arena_gives_aligned_disjoint_memory) {
  Arena arena;
  arena.reset(Arena::bytes(3, 4) + Arena::bytes(100, 8));
  float* a = arena.take<float>(3);
  int64_t* b = arena.take<int64_t>(100);
  EXPECT(reinterpret_cast<uintptr_t>(a) % Arena::kAlign == 0 && reinterpret_cast<uintptr_t>(b) % Arena::kAlign == 0);
  for (int i = 0; i < 100; ++i) b[i] = -1;
  a[0] = a[1] = a[2] = 1.0f;
  EXPECT(b[0] == -1);
}

}  // namespace effkern::test
