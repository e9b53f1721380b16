// Depthwise convolution over tiles, and its gradients, on a CUDA device.
//
// Channels lie in the lanes, two to a thread, so that every access is coalesced. A thread holds a block of output
// positions in registers and meets rows of the input through the first-level cache: a value read serves up to k x 2
// positions, a weight serves a whole row of them, and a masked neighbour's taps are never issued. That leaves the
// multipliers, not the cache, as what bounds the kernel (for 7x7 and rows of 8 positions: 392 cycles of
// multiply-adds against about 210 of loads in bf16, 320 in fp32, per warp).
//
// Tiles whose side is 2, or a multiple of 4, take that road at stride 1. All others, which have little to do (one
// position a tile) or are rare (odd sides, stride 2, odd channel counts), take each position's taps from a list.
#include "cuda/masked_depthwise.h"

#include "cuda/element.cuh"
#include "cuda/launch.cuh"

namespace fastmim {
namespace cuda {

namespace {

constexpr int kReach = 3, kWindow = 7, kCells = kWindow * kWindow;  // of the neighbour table
constexpr int kThreads = 256, kWarp = 32;
constexpr int kRows = 2;       // output rows, or kernel rows of a weight gradient, that a thread holds
constexpr int kMostItems = 16; // positions that a block makes lists for
constexpr int kTasks = 512;    // parts times chunks of a weight gradient: fills a device, and few sums are left to add

// How a block's threads are dealt out: `lanes` threads have neighbouring channels and share an item of work.
struct Deal {
  int64_t total;                  // items
  int count, side, channels;      // K, t of the tiles read, C
  int out_side, stride, kernel;   // t of the tiles written
  int lanes, items;               // lanes * items <= kThreads
};

__device__ inline int split_cell(int i, int side) {  // floor(i / side)
  if (side == 1) return i;
  return i < 0 ? -((side - 1 - i) / side) : i / side;
}

// Of position i beside a tile: which cell away, and the position in it. A side of 2 may need two cells, a longer one
// is never further than one cell away, so there is no division.
template <bool Two>
__device__ inline void split(int i, int side, int& cell, int& position) {
  if (Two)
    cell = i >> 1;
  else
    cell = i < 0 ? -1 : (i >= side ? 1 : 0);
  position = i - cell * side;
}

// The pieces of S columns around strip `strip` of a tile: columns [-reach * S, (reach + 1) * S) from its first.
template <int K, int S>
struct Pieces {
  static constexpr int radius = K / 2, reach = (radius + S - 1) / S, count = 2 * reach + 1;
  static constexpr int columns = S + 2 * radius;  // of the input that S outputs read
  int cell[count], column[count];

  __device__ Pieces(int strip, int side) {
#pragma unroll
    for (int i = 0; i < count; ++i) split<S == 2>((strip + i - reach) * S, side, cell[i], column[i]);
  }
  // Place of column j of piece i among `columns`; out of range where nobody reads it.
  __device__ static constexpr int place(int i, int j) { return i * S + j - (reach * S - radius); }
};

// Reads row `y` (from -radius on) of the columns around a strip. visible[i]: piece i is there, else it is left alone.
template <int K, int S, int V, typename T>
__device__ inline void read_row(const Pieces<K, S>& pieces, const int32_t* near, const T* image, int y, int side,
                                int channels, float (&x)[Pieces<K, S>::columns][V],
                                bool (&visible)[Pieces<K, S>::count]) {
  int cell, row;
  split<S == 2>(y, side, cell, row);
  const int32_t* tiles = near + (cell + kReach) * kWindow + kReach;
#pragma unroll
  for (int i = 0; i < Pieces<K, S>::count; ++i) {
    const int tile = tiles[pieces.cell[i]];
    visible[i] = tile >= 0;
    if (!visible[i]) continue;
    const T* from = image + static_cast<int64_t>((tile * side + row) * side + pieces.column[i]) * channels;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      const int place = Pieces<K, S>::place(i, j);
      if (place >= 0 && place < Pieces<K, S>::columns) load<V>(from + static_cast<int64_t>(j) * channels, x[place]);
    }
  }
}

// Weight [C, k, k] and bias as [k * k + 1, C] in fp32: what a warp reads of a tap is contiguous.
template <typename W>
__global__ void __launch_bounds__(kThreads)
pack(const W* weight,  // [C, taps]
     const W* bias,    // [C] or null
     float* packed,    // [taps + 1, C]
     int taps, int channels) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= (taps + 1) * channels) return;
  const int tap = i / channels, c = i % channels;
  float value = 0.0f;
  if (tap < taps)
    value = to_float(weight[static_cast<int64_t>(c) * taps + tap]);
  else if (bias != nullptr)
    value = to_float(bias[c]);
  packed[i] = value;
}

// kRows x S output positions a thread. Transposed by reading the taps backwards: `step` is then -C and `weight` the
// last tap.
template <typename T, int K, int S>
__global__ void __launch_bounds__(kThreads, 2)
convolve_rows(Deal d,
              const int32_t* __restrict__ neighbours,  // [B, K, 7, 7]
              const T* __restrict__ source,            // [B, K, t, t, C]
              const float* __restrict__ weight,        // tap 0 of [k * k, C]
              int step,                                // from tap to tap
              const float* __restrict__ bias,          // [C]
              T* __restrict__ out) {                   // [B, K, t, t, C]
  constexpr int V = 2, radius = K / 2;
  using Around = Pieces<K, S>;
  const int slot = threadIdx.x / d.lanes, lane = threadIdx.x - slot * d.lanes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * d.items + slot;
  const int c = (blockIdx.y * d.lanes + lane) * V;
  if (slot >= d.items || item >= d.total || c >= d.channels) return;
  const int strips = d.side / S, per_tile = strips * (d.side / kRows);
  const int tile = static_cast<int>(item) / per_tile, within = static_cast<int>(item) - tile * per_tile;
  const int y0 = within / strips * kRows, strip = within % strips;
  const int32_t* near = neighbours + static_cast<int64_t>(tile) * kCells;
  const T* image = source + static_cast<int64_t>(tile - tile % d.count) * d.side * d.side * d.channels + c;
  const Around pieces(strip, d.side);

  float sums[kRows][S][V], taps[kRows][K][V], start[V];
  load<V>(bias + c, start);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int o = 0; o < S; ++o)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[r][o][v] = start[v];

#pragma unroll 2
  for (int row = 0; row < K + kRows - 1; ++row) {
    float x[Around::columns][V];
    bool visible[Around::count];
    read_row<K, S, V>(pieces, near, image, y0 + row - radius, d.side, d.channels, x, visible);
    // Input row `row` meets kernel row `row` in the first output row and kernel row `row - 1` in the second.
#pragma unroll
    for (int kx = 0; kx < K; ++kx) {
#pragma unroll
      for (int v = 0; v < V; ++v) taps[1][kx][v] = taps[0][kx][v];
      if (row < K) load<V>(weight + static_cast<int64_t>(row * K + kx) * step + c, taps[0][kx]);
    }
#pragma unroll
    for (int i = 0; i < Around::count; ++i) {
      if (!visible[i]) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r == 0 ? row == K : row == 0) continue;
#pragma unroll
        for (int j = 0; j < S; ++j) {
          const int place = Around::place(i, j);
          if (place < 0 || place >= Around::columns) continue;
#pragma unroll
          for (int o = 0; o < S; ++o) {
            const int kx = place - o;
            if (kx < 0 || kx >= K) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) sums[r][o][v] += x[place][v] * taps[r][kx][v];
          }
        }
      }
    }
  }
  T* to = out + (static_cast<int64_t>(tile) * d.side * d.side + y0 * d.side + strip * S) * d.channels + c;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int o = 0; o < S; ++o) store<V>(to + static_cast<int64_t>(r * d.side + o) * d.channels, sums[r][o]);
}

struct Tap {
  int tap, row;  // ky * k + kx; row of the tensor read, within the image
};

// Row of the tensor read, within its image, that position (y, x) of a tile meets at a tap, or -1. Forward: an output
// reads input y * s + ky - R. Transposed: an input went into output (y + R - ky) / s.
template <bool Transposed>
__device__ inline int source_row(const Deal& d, const int32_t* near, int y, int x, int ky, int kx) {
  const int radius = d.kernel / 2;
  int row = Transposed ? y + radius - ky : y * d.stride + ky - radius;
  int column = Transposed ? x + radius - kx : x * d.stride + kx - radius;
  if (Transposed && d.stride == 2) {
    if ((row | column) & 1) return -1;
    row >>= 1, column >>= 1;
  }
  const int up = split_cell(row, d.side), left = split_cell(column, d.side);
  const int tile = near[(up + kReach) * kWindow + left + kReach];
  return tile < 0 ? -1 : (tile * d.side + row - up * d.side) * d.side + column - left * d.side;
}

// One output position a thread. A warp makes the list of a position's visible taps, all its channels use it.
template <typename T, int V, bool Transposed>
__global__ void __launch_bounds__(kThreads)
convolve_positions(Deal d,
                   const int32_t* __restrict__ neighbours,  // [B, K, 7, 7]
                   const T* __restrict__ source,            // [B, K, t, t, C] of the tiles read
                   const float* __restrict__ weight,        // [k * k, C]
                   const float* __restrict__ bias,          // [C]
                   T* __restrict__ out) {                   // [B, K, t', t', C] of the tiles written
  __shared__ Tap lists[kMostItems][kCells];
  __shared__ int lengths[kMostItems];
  const int64_t first_item = static_cast<int64_t>(blockIdx.x) * d.items;
  const int positions = d.out_side * d.out_side;
  for (int slot = threadIdx.x / kWarp; slot < d.items; slot += kThreads / kWarp) {
    if (first_item + slot >= d.total) continue;
    const int item = static_cast<int>(first_item) + slot, tile = item / positions, within = item - tile * positions;
    const int y = within / d.out_side, x = within - y * d.out_side;
    const int32_t* near = neighbours + static_cast<int64_t>(tile) * kCells;
    int length = 0;
    for (int first = 0; first < d.kernel * d.kernel; first += kWarp) {
      const int lane = threadIdx.x % kWarp, tap = first + lane;
      int row = -1;
      if (tap < d.kernel * d.kernel)
        row = source_row<Transposed>(d, near, y, x, tap / d.kernel, tap % d.kernel);
      const unsigned there = __ballot_sync(0xffffffffu, row >= 0);
      if (row >= 0) lists[slot][length + __popc(there & ((1u << lane) - 1u))] = {tap, row};
      length += __popc(there);
    }
    if (threadIdx.x % kWarp == 0) lengths[slot] = length;
  }
  __syncthreads();

  const int slot = threadIdx.x / d.lanes, lane = threadIdx.x - slot * d.lanes;
  const int64_t item = first_item + slot;
  const int c = (blockIdx.y * d.lanes + lane) * V;
  if (slot >= d.items || item >= d.total || c >= d.channels) return;
  const int64_t tile = static_cast<int>(item) / positions;
  const T* image = source + (tile - tile % d.count) * d.side * d.side * d.channels + c;
  float sum[V];
  load<V>(bias + c, sum);
#pragma unroll 4
  for (int i = 0; i < lengths[slot]; ++i) {
    const Tap at = lists[slot][i];
    float x[V], w[V];
    load<V>(image + static_cast<int64_t>(at.row) * d.channels, x);
    load<V>(weight + at.tap * d.channels + c, w);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += x[v] * w[v];
  }
  store<V>(out + item * d.channels + c, sum);
}

// The weight gradient: for every tap, the sum over positions of input times output gradient. Each part adds up a
// range of tiles in their order; add_parts then adds the parts in theirs.

// What a thread of a weight gradient has: the tiles [from, to), a role among the kernel's rows, two channels.
struct Share {
  int64_t part;
  int from, to, role, c;
  bool idle;
};

__device__ inline Share share_of(const Deal& d, int roles, int parts, int V) {
  Share s;
  const int slot = threadIdx.x / d.lanes, lane = threadIdx.x - slot * d.lanes, together = d.items / roles;
  s.role = slot % roles;
  s.part = static_cast<int64_t>(blockIdx.x) * together + slot / roles;
  s.c = (blockIdx.y * d.lanes + lane) * V;
  s.idle = slot >= together * roles || s.part >= parts || s.c >= d.channels;
  s.from = static_cast<int>(d.total * s.part / parts), s.to = static_cast<int>(d.total * (s.part + 1) / parts);
  return s;
}

template <typename T, int K, int S>
__global__ void __launch_bounds__(kThreads, 2)
weight_gradient_rows(Deal d, int parts,
                     const int32_t* __restrict__ neighbours,  // [B, K, 7, 7]
                     const T* __restrict__ x,                 // [B, K, t, t, C]
                     const T* __restrict__ gradient,          // [B, K, t, t, C]
                     float* __restrict__ partial) {           // [parts, k * k + 1, C]
  constexpr int V = 2, radius = K / 2, roles = (K + kRows - 1) / kRows;
  using Around = Pieces<K, S>;
  const Share mine = share_of(d, roles, parts, V);
  if (mine.idle) return;
  const int ky = mine.role * kRows;
  const bool second = ky + 1 < K;
  float sums[kRows][K][V] = {}, total[V] = {};
  for (int tile = mine.from; tile < mine.to; ++tile) {
    const int32_t* near = neighbours + static_cast<int64_t>(tile) * kCells;
    const T* image = x + static_cast<int64_t>(tile - tile % d.count) * d.side * d.side * d.channels + mine.c;
    for (int strip = 0; strip < d.side / S; ++strip) {
      const Around pieces(strip, d.side);
      const T* from =
          gradient + (static_cast<int64_t>(tile) * d.side * d.side + strip * S) * d.channels + mine.c;
      float g[kRows][S][V];
#pragma unroll 2
      for (int row = 0; row < d.side + kRows - 1; ++row) {
        float input[Around::columns][V];
        bool visible[Around::count];
        read_row<K, S, V>(pieces, near, image, row + ky - radius, d.side, d.channels, input, visible);
        // Input row `row` meets output row `row` in the first kernel row and output row `row - 1` in the second.
#pragma unroll
        for (int o = 0; o < S; ++o) {
#pragma unroll
          for (int v = 0; v < V; ++v) g[1][o][v] = g[0][o][v];
          if (row < d.side) {
            load<V>(from + static_cast<int64_t>(row * d.side + o) * d.channels, g[0][o]);
#pragma unroll
            for (int v = 0; v < V; ++v) total[v] += g[0][o][v];
          }
        }
#pragma unroll
        for (int i = 0; i < Around::count; ++i) {
          if (!visible[i]) continue;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (r == 0 ? row == d.side : row == 0 || !second) continue;
#pragma unroll
            for (int j = 0; j < S; ++j) {
              const int place = Around::place(i, j);
              if (place < 0 || place >= Around::columns) continue;
#pragma unroll
              for (int o = 0; o < S; ++o) {
                const int kx = place - o;
                if (kx < 0 || kx >= K) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) sums[r][kx][v] += input[place][v] * g[r][o][v];
              }
            }
          }
        }
      }
    }
  }
  float* to = partial + mine.part * (K * K + 1) * d.channels + mine.c;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int kx = 0; kx < K; ++kx)
      if (r == 0 || second) store<V>(to + static_cast<int64_t>((ky + r) * K + kx) * d.channels, sums[r][kx]);
  if (mine.role == 0) store<V>(to + static_cast<int64_t>(K * K) * d.channels, total);
}

template <typename T, int K, int V>
__global__ void __launch_bounds__(kThreads, 3)
weight_gradient_positions(Deal d, int parts,
                          const int32_t* __restrict__ neighbours,  // [B, K, 7, 7]
                          const T* __restrict__ x,                 // [B, K, t, t, C]
                          const T* __restrict__ gradient,          // [B, K, t/s, t/s, C]
                          float* __restrict__ partial) {           // [parts, k * k + 1, C]
  const Share mine = share_of(d, K, parts, V);
  if (mine.idle) return;
  const int positions = d.out_side * d.out_side;
  float sums[K][V] = {}, total[V] = {};
  for (int tile = mine.from; tile < mine.to; ++tile) {
    const int32_t* near = neighbours + static_cast<int64_t>(tile) * kCells;
    const T* image = x + static_cast<int64_t>(tile - tile % d.count) * d.side * d.side * d.channels + mine.c;
    for (int position = 0; position < positions; ++position) {
      float g[V];
      load<V>(gradient + (static_cast<int64_t>(tile) * positions + position) * d.channels + mine.c, g);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] += g[v];
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        const int row =
            source_row<false>(d, near, position / d.out_side, position % d.out_side, mine.role, kx);
        if (row < 0) continue;
        float input[V];
        load<V>(image + static_cast<int64_t>(row) * d.channels, input);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[kx][v] += input[v] * g[v];
      }
    }
  }
  float* to = partial + mine.part * (K * K + 1) * d.channels + mine.c;
#pragma unroll
  for (int kx = 0; kx < K; ++kx) store<V>(to + static_cast<int64_t>(mine.role * K + kx) * d.channels, sums[kx]);
  if (mine.role == 0) store<V>(to + static_cast<int64_t>(K * K) * d.channels, total);
}

// One warp a range of parts, then one sum of the warps in their order.
template <typename W>
__global__ void __launch_bounds__(kThreads)
add_parts(const float* __restrict__ partial,  // [parts, taps + 1, C]
          int parts, int taps, int channels,
          W* __restrict__ weight_gradient,    // [C, taps]
          W* __restrict__ bias_gradient) {    // [C] or null
  constexpr int warps = kThreads / kWarp;
  __shared__ float sums[warps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int columns = (taps + 1) * channels, column = blockIdx.x * kWarp + lane;
  float sum = 0.0f;
  if (column < columns)
#pragma unroll 4
    for (int part = parts * warp / warps; part < parts * (warp + 1) / warps; ++part)
      sum += partial[static_cast<int64_t>(part) * columns + column];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int other = 1; other < warps; ++other) sum += sums[other][lane];
  const int tap = column / channels, c = column % channels;
  if (tap < taps)
    from_float(sum, weight_gradient + static_cast<int64_t>(c) * taps + tap);
  else if (bias_gradient != nullptr)
    from_float(sum, bias_gradient + c);
}

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int strip_of(const MaskedDepthwise& p) {  // S, or 0 where positions are taken one by one
  if (p.stride != 1 || p.channels % 2) return 0;
  return p.side % 8 == 0 ? 8 : p.side % 4 == 0 ? 4 : p.side == 2 ? 2 : 0;
}

bool aligned(const MaskedDepthwise& p, const void* a, const void* b) {
  const uintptr_t pair = p.element == 0 ? 8 : 4;
  return p.channels % 2 == 0 && reinterpret_cast<uintptr_t>(a) % pair == 0 && reinterpret_cast<uintptr_t>(b) % pair == 0;
}

// Equal chunks of at most 32 lanes of V channels; chunks are the grid's second axis, so that blocks that run together
// share weights.
Deal deal(const MaskedDepthwise& p, int V, int64_t side, int64_t out_side, int64_t items_per_tile) {
  const int lanes = ceil_div(p.channels, V), chunks = ceil_div(lanes, kWarp);
  Deal d{};
  d.total = p.batch * p.count * items_per_tile;
  d.count = static_cast<int>(p.count), d.side = static_cast<int>(side), d.channels = static_cast<int>(p.channels);
  d.out_side = static_cast<int>(out_side), d.stride = static_cast<int>(p.stride), d.kernel = static_cast<int>(p.kernel);
  d.lanes = ceil_div(lanes, chunks), d.items = kThreads / d.lanes;
  return d;
}
int chunks_of(const Deal& d, int V) { return ceil_div(ceil_div(d.channels, V), d.lanes); }

const char* check(const MaskedDepthwise& p) {
  if (p.batch * p.count * p.side * p.side > 0x7fffffff)
    return "a depthwise convolution of 2^31 or more positions: split the batch";
  return nullptr;
}

template <typename T, int K, int S>
void launch_rows(const MaskedDepthwise& p, const T* source, T* out, bool transposed) {
  const Deal d = deal(p, 2, p.side, p.side, p.side / S * (p.side / kRows));
  const int taps = K * K, channels = d.channels;
  const dim3 grid(ceil_div(d.total, d.items), chunks_of(d, 2));
  launch(convolve_rows<T, K, S>, grid, kThreads, p.stream, d, p.neighbours, source,
         transposed ? p.room + static_cast<int64_t>(taps - 1) * channels : p.room, transposed ? -channels : channels,
         p.room + static_cast<int64_t>(taps) * channels, out);
}

template <typename T, int S>
void launch_rows_of(const MaskedDepthwise& p, const T* source, T* out, bool transposed) {
  if (p.kernel == 3) launch_rows<T, 3, S>(p, source, out, transposed);
  if (p.kernel == 5) launch_rows<T, 5, S>(p, source, out, transposed);
  if (p.kernel == 7) launch_rows<T, 7, S>(p, source, out, transposed);
}

template <typename T, int V, bool Transposed>
void launch_positions(const MaskedDepthwise& p, const T* source, T* out) {
  const int64_t small = p.side / p.stride, side = Transposed ? small : p.side, out_side = Transposed ? p.side : small;
  Deal d = deal(p, V, side, out_side, out_side * out_side);
  if (d.items > kMostItems) d.items = kMostItems;
  const int64_t taps = p.kernel * p.kernel;
  const dim3 grid(ceil_div(d.total, d.items), chunks_of(d, V));
  launch(convolve_positions<T, V, Transposed>, grid, kThreads, p.stream, d, p.neighbours, source, p.room,
         p.room + taps * p.channels, out);
}

template <bool Transposed>
const char* convolve(const MaskedDepthwise& p, const void* from, void* to) {
  if (const char* wrong = check(p)) return wrong;
  if (p.batch == 0) return nullptr;
  const int taps = static_cast<int>(p.kernel * p.kernel), channels = static_cast<int>(p.channels);
  by_element(p.weight_element, [&](auto example) {
    using W = decltype(example);
    const W* bias = Transposed ? nullptr : static_cast<const W*>(p.bias);
    launch(pack<W>, dim3(ceil_div(static_cast<int64_t>(taps + 1) * channels, kThreads)), kThreads, p.stream,
           static_cast<const W*>(p.weight), bias, p.room, taps, channels);
  });
  by_element(p.element, [&](auto example) {
    using T = decltype(example);
    const T* source = static_cast<const T*>(from);
    T* out = static_cast<T*>(to);
    const int strip = aligned(p, from, to) ? strip_of(p) : 0;
    if (strip == 8)
      launch_rows_of<T, 8>(p, source, out, Transposed);
    else if (strip == 4)
      launch_rows_of<T, 4>(p, source, out, Transposed);
    else if (strip == 2)
      launch_rows_of<T, 2>(p, source, out, Transposed);
    else if (aligned(p, from, to))
      launch_positions<T, 2, Transposed>(p, source, out);
    else
      launch_positions<T, 1, Transposed>(p, source, out);
  });
  return launch_error();
}

// Depends on the shape alone, so that the same sums come out on every device.
int parts_of(const MaskedDepthwise& p) {
  const Deal d = deal(p, p.channels % 2 ? 1 : 2, p.side, p.side, 1);
  const int64_t wanted = kTasks / chunks_of(d, p.channels % 2 ? 1 : 2), tiles = p.batch * p.count;
  const int64_t parts = wanted < tiles ? wanted : tiles;
  return parts > 1 ? static_cast<int>(parts) : 1;
}

template <typename T, int K>
void launch_weight_gradient(const MaskedDepthwise& p, int parts) {
  const T *x = static_cast<const T*>(p.x), *gradient = static_cast<const T*>(p.out);
  const bool pairs = aligned(p, x, gradient);
  const int strip = pairs ? strip_of(p) : 0, V = pairs ? 2 : 1, roles = strip ? (K + kRows - 1) / kRows : K;
  const Deal d = deal(p, V, p.side, p.side / p.stride, 1);
  const dim3 grid(ceil_div(parts, d.items / roles), chunks_of(d, V));
  const auto start = [&](auto kernel) {
    launch(kernel, grid, kThreads, p.stream, d, parts, p.neighbours, x, gradient, p.room);
  };
  if (strip == 8)
    start(weight_gradient_rows<T, K, 8>);
  else if (strip == 4)
    start(weight_gradient_rows<T, K, 4>);
  else if (strip == 2)
    start(weight_gradient_rows<T, K, 2>);
  else if (pairs)
    start(weight_gradient_positions<T, K, 2>);
  else
    start(weight_gradient_positions<T, K, 1>);
}

}  // namespace

int64_t depthwise_room(const MaskedDepthwise& p, bool weight_gradient) {
  const int64_t sums = (p.kernel * p.kernel + 1) * p.channels;
  return weight_gradient ? parts_of(p) * sums : sums;
}

const char* masked_depthwise(const MaskedDepthwise& p) { return convolve<false>(p, p.x, p.out); }

const char* masked_depthwise_input_gradient(const MaskedDepthwise& p) {
  return convolve<true>(p, p.out, p.x_gradient);
}

const char* masked_depthwise_weight_gradient(const MaskedDepthwise& p) {
  if (const char* wrong = check(p)) return wrong;
  const int parts = parts_of(p), taps = static_cast<int>(p.kernel * p.kernel), channels = static_cast<int>(p.channels);
  by_element(p.element, [&](auto example) {
    using T = decltype(example);
    if (p.kernel == 3) launch_weight_gradient<T, 3>(p, parts);
    if (p.kernel == 5) launch_weight_gradient<T, 5>(p, parts);
    if (p.kernel == 7) launch_weight_gradient<T, 7>(p, parts);
  });
  by_element(p.weight_element, [&](auto example) {
    using W = decltype(example);
    launch(add_parts<W>, dim3(ceil_div(static_cast<int64_t>(taps + 1) * channels, kWarp)), kThreads, p.stream, p.room,
           parts, taps, channels, static_cast<W*>(p.weight_gradient), static_cast<W*>(p.bias_gradient));
  });
  return launch_error();
}

}  // namespace cuda
}  // namespace fastmim
