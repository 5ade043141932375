// Prints what each kernel is launched with, for the static checks (tests/gpu/proof_static.py).
#include <cstring>

#include "../../block_skip/block_grad.cuh"
#include "../../block_skip/compact.cuh"
#include "../../block_skip/stage.cuh"
#include "../../conv/conv_configs.cuh"
#include "../../conv/depthwise.cuh"
#include "../../conv_backward/act_grad.cuh"
#include "../../conv_backward/depthwise_wgrad.cuh"
#include "../../conv_backward/fold.cuh"
#include "../../conv_backward/transpose.cuh"
#include "../../conv_backward/wgrad.cuh"
#include "../../multi_branch_bn/bn_backward.cuh"
#include "../../pq/book_grad.cuh"
#include "../../pq/decode.cuh"
#include "../../pq/dots.cuh"
#include "../../pq/dots_mma.cuh"
#include "../../pq/embedding.cuh"
#include "../../sliced_conv/ragged_grad.cuh"
#include "../../sliced_conv/schedule.cuh"
#include "../check.h"

namespace effkern::test {
namespace {

using namespace conv::gpu;

template <class C>
void print(int shared, const char* kernel = "") {
  constexpr const char* names[] = {"F16", "BF16", "TF32", "F32"};
  std::printf("plan %s%s %dx%d %dx%d %d%s: %d threads %d bytes %d blocks\n", kernel, names[static_cast<int>(C::kMath)],
              C::kTileM, C::kTileN, C::kWarpM, C::kWarpN, C::kStages, C::kAligned ? "" : "u", C::kThreads, shared,
              C::kBlocks);
  EXPECT(shared <= 99 << 10, "more than a block may have on parts with 100 KiB");
}

template <Math kMath, class T, bool kListed>
void wgrad_tiles(const char* kernel) {
  print<WgradLarge<kMath, T, kListed>>(WgradLarge<kMath, T, kListed>::kShared, kernel);
  print<WgradSmall<kMath, T, kListed>>(WgradSmall<kMath, T, kListed>::kShared, kernel);
  print<WgradUnaligned<kMath, T, kListed>>(WgradUnaligned<kMath, T, kListed>::kShared, kernel);
}

template <Math kMath, class T>
void tiles() {
  print<Large<kMath, T>>(kSharedBytes<Large<kMath, T>>);
  print<Narrow<kMath, T>>(kSharedBytes<Narrow<kMath, T>>);
  print<Small<kMath, T>>(kSharedBytes<Small<kMath, T>>);
  print<Tiny<kMath, T>>(kSharedBytes<Tiny<kMath, T>>);
  print<Unaligned<kMath, T>>(kSharedBytes<Unaligned<kMath, T>>);
  wgrad_tiles<kMath, T, false>("wgrad ");
  wgrad_tiles<kMath, T, true>("listed wgrad ");
}

}  // namespace

TEST(conv_gpu_plans) {
  tiles<Math::F16, device::F16>();
  tiles<Math::BF16, device::BF16>();
  tiles<Math::TF32, float>();
  tiles<Math::F32, float>();
}

// Kernels of one tile: named as the compiler demangles them.
TEST(other_plans) {
  const auto print = [](const char* name, int threads, int shared, int blocks) {
    std::printf("plan %s: %d threads %d bytes %d blocks\n", name, threads, shared, blocks);
  };
  for (const char* bits : {"unsigned char", "unsigned short", "unsigned int"})
    print(("compact<" + std::string(bits) + ">").c_str(), block_skip::kCompactThreads, block_skip::kCompactShared, 4);
  for (const char* type : {"effkern::device::F16", "effkern::device::BF16", "float"})
    for (const char* sliding : {"true", "false"}) {
      // A 3x3 kernel with stride 1, or 2 where nothing slides.
      const conv::gpu::Size2 stride = *sliding == 't' ? conv::gpu::Size2{1, 1} : conv::gpu::Size2{2, 2};
      conv::gpu::DepthwiseProblem<float> p{};
      p.kernel = {3, 3}, p.stride = stride, p.dilation = {1, 1}, p.strips = 4;
      const int filters = *type == 'f' ? 0 : 9 * 32 * 4;  // twice the channels of fp32
      print(("depthwise<" + std::string(type) + ", " + sliding + ">").c_str(), conv::gpu::kDepthwiseThreads,
            static_cast<int>(depthwise_shared(p)) + filters, *sliding == 't' ? 4 : 2);
    }
  for (const char* type : {"effkern::device::F16", "effkern::device::BF16", "float"})
    for (const char* wide : {"true", "false"})
      print(("lookup<" + std::string(type) + ", " + wide + ">").c_str(), pq::kLookupThreads, 0, 4);
  const auto coded = [&]<class T>(T, const std::string& type) {
    const std::string whole = std::to_string(16 / sizeof(T));
    for (const std::string& form : {whole + ", true", whole + ", false", std::string("1, false")})
      print(("decode<" + type + ", " + form + ">").c_str(), pq::kDecodeThreads, 0,
            pq::decode_blocks(form == whole + ", true"));
    // A book of 256 entries of one chunk, for rows of 512 codes.
    pq::Dots<T> p{};
    p.rows = p.outputs = p.positions = 512;
    if constexpr (sizeof(T) == 4) {
      p.codes = {{}, 1, false, 256}, p.d = 4;
      EXPECT(pq::plan(p));
      for (const int rows : {1, 8}) {
        p.rows = rows;
        print(("dots<" + type + ", 4, " + std::to_string(rows) + ">").c_str(), pq::kDotsThreads,
              static_cast<int>(shared_of(p)), 3);
      }
    } else {
      for (const auto& [tiles, eights] : {std::pair{1, 1}, {2, 1}, {2, pq::kMmaEights}})
        for (const int per : {8, 4}) {
          p.codes = {{}, per == 8 ? 1 : 2, false, 256}, p.d = per;
          EXPECT(pq::plan(p));
          p.tiles = tiles, p.eights = eights;
          print(("dots_mma<" + type + ", " + std::to_string(per) + ", " + std::to_string(tiles) + ", " +
                 std::to_string(eights) + ">")
                    .c_str(),
                pq::kMmaThreads, pq::mma_shared(p), pq::mma_blocks(tiles, eights));
        }
    }
  };
  coded(device::F16{}, "effkern::device::F16"), coded(device::BF16{}, "effkern::device::BF16");
  coded(float{}, "float");
  for (const std::string type : {"<effkern::device::F16>", "<effkern::device::BF16>", "<float>"}) {
    print(("act_grad" + type).c_str(), device::kColumnThreads, device::kColumnShared, 8);
    print(("transpose" + type).c_str(), kTransposeThreads, kTransposeShared, 4);
    print(("depthwise_wgrad" + type).c_str(), device::kColumnThreads, device::kColumnShared, 3);
    print(("fold" + type).c_str(), kFoldThreads, 0, 4);
    print(("block_grad" + type).c_str(), device::kColumnThreads, device::kColumnShared, 5);
    print(("ragged_grad" + type).c_str(), device::kColumnThreads, device::kColumnShared, 5);
    print(("book_grad" + type).c_str(), pq::kBookGradThreads, pq::kBookGradFloats * 4, 4);
    print(("book_fold" + type).c_str(), pq::kBookFoldThreads, 0, 4);
    print(("row_dots" + type).c_str(), pq::kRowDotsThreads, 0, 4);
  }
  const auto batch_norms = [&]<class T>(T, const std::string& type) {
    namespace bn = multi_branch_bn::gpu;
    print(("bn_statistics" + type).c_str(), device::kColumnThreads, bn::kStatisticsShared, 8);
    print(("bn_apply" + type).c_str(), device::kColumnThreads, 0, 4);
    print(("bn_gradient_sums" + type).c_str(), device::kColumnThreads, bn::kSumsShared<T>, 3);
    print(("bn_gradient_apply" + type).c_str(), device::kColumnThreads, bn::kGradientShared<T>, 4);
  };
  batch_norms(device::F16{}, "<effkern::device::F16>");
  batch_norms(device::BF16{}, "<effkern::device::BF16>");
  batch_norms(0.0f, "<float>");
  using multi_branch_bn::gpu::kBranches, multi_branch_bn::gpu::kTermThreads, multi_branch_bn::gpu::kFinishShared;
  print("bn_finish", kBranches * kTermThreads, kFinishShared, 1);
  print("bn_gradient_finish", (1 + kBranches) * kTermThreads, kFinishShared, 1);
  print("fold_sums", kFoldThreads, 0, 4);
  print("fold_table", sliced_conv::kFoldTableThreads, 0, 4);
  // A stage of CIFAR: 16 channels @32, 32 @16, 64 @8.
  constexpr const char* maths[] = {"F16", "BF16", "TF32", "F32"};
  for (int math = 0; math < 4; ++math)
    for (const int channels : {16, 32, 64}) {
      const int size = math < 2 ? 2 : 4, side = 512 / channels;
      print((std::string("stage ") + maths[math] + " " + std::to_string(channels)).c_str(),
            block_skip::stage_threads(channels), static_cast<int>(block_skip::stage_shared(channels, size, side, side)),
            1);
    }
  print("schedule", sliced_conv::kMostScheduleThreads, sliced_conv::kScheduleShared, 1);
}

}  // namespace effkern::test
