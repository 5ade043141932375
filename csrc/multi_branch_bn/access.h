// Tiles of a tensor as fp32: in place where it lies so, through a buffer otherwise.
#pragma once

#include "kernels.h"
#include "walk.h"

namespace effkern::multi_branch_bn {

class Access {
 public:
  Access() = default;
  // `stream`: what is written will not be found in a cache by who reads it, so it need not go there.
  Access(const Activation& a, const Walk& walk, const Kernels& kernels, bool stream = false);

  // The tile, in place or copied to `buffer`; `pitch` as in Tile; `ahead` from here to the tile behind it, 0 if that is
  // not in place.
  const float* read(const Spot& s, float* buffer, int64_t* pitch, int64_t* ahead) const;
  // Where to write a tile: in place or `buffer`. Call finish() afterwards.
  float* place(const Spot& s, float* buffer, int64_t* pitch) const;
  // Whether place() is in place and wants stores past the caches.
  bool past() const { return direct_ && stream_ && lines_; }
  // Stores a tile that was written to the buffer. Only for a dense tensor that lies as the walk goes.
  void finish(const Spot& s, const float* buffer) const;
  // The first position of a channel.
  float first(int64_t channel) const { return load_float(a_.data, a_.dtype, channel * a_.sc); }

 private:
  template <class Run>
  void runs(const Spot& s, Run run) const;
  // Elements from the start to a position, where planes have a pitch.
  int64_t offset(int64_t q) const { return even_ ? q * pixel_ : q / walk_->plane * a_.sn + q % walk_->plane * pixel_; }
  void put(const float* from, int64_t count, int64_t to) const;

  Activation a_;
  const Walk* walk_ = nullptr;
  const Kernels* kernels_ = nullptr;
  int64_t pixel_ = 0;    // elements from one position of a plane to the next, -1 if that varies
  bool even_ = false;    // the same also from one sample to the next
  bool direct_ = false;  // tiles are in place
  bool stream_ = false;
  bool lines_ = false;  // rows of a tile are whole cache lines
};

}  // namespace effkern::multi_branch_bn
