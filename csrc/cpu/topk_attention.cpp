// Attention to the keys of largest score. Sixteen queries look for their thresholds side by side, by bisection, while
// the scores are in the nearest cache. The choice is kept for the backward pass, one bit a key.
#include "cpu/topk_attention.h"

#include <stdint.h>

#include "cpu/attention_head.h"

namespace fastmim {
namespace FASTMIM_ISA {

namespace {

constexpr int kHalvings = 20;  // of the interval between smallest and largest score, before its bits are bisected

// Which keys sixteen queries keep.
struct Choice {
  Lanes threshold;
  LanesInt last;
  bool ties;  // some query keeps only the keys up to `last` of those at its threshold
};

FASTMIM_INLINE void choose(const LanesInt& condition, const LanesInt& yes, const LanesInt& no, LanesInt& out) {
  out = (condition & yes) | (~condition & no);
}

FASTMIM_INLINE bool all(const LanesInt& condition) {
  int32_t lanes[kLanes], every = -1;
  memcpy(lanes, &condition, sizeof(lanes));
  for (int i = 0; i < kLanes; ++i) every &= lanes[i];
  return every != 0;
}

// Integers in the order of the floats, and back: its own inverse.
FASTMIM_INLINE void ordered(const LanesInt& bits, LanesInt& out) { out = bits ^ ((bits >> 31) & 0x7fffffff); }

// Number of scores below `bound`. One that is not a number is below nothing: it is chosen and shows.
FASTMIM_INLINE void count_below(const float* scores, int64_t first, int64_t keys, const Lanes& bound, LanesInt& count) {
  count = LanesInt{};
  Lanes x;
  for (int64_t k = first; k < keys; ++k) {
    load(scores + k * kBlock, x);
    count -= x < bound;
  }
}

// The choice of `kept` keys among [prefix, keys), for the active ones of sixteen queries; the others choose all.
FASTMIM_INLINE void find_choice(const float* scores, int64_t prefix, int64_t keys, int64_t kept,
                                const LanesInt& active, Choice& choice) {
  // Always: at most `spare` scores are below low, more than that below high. So the answer is in [low, high).
  const LanesInt spare = LanesInt{} + static_cast<int32_t>(keys - prefix - kept);
  Lanes low = Lanes{} + kInfinity, high = -low, x;
  for (int64_t k = prefix; k < keys; ++k) {
    load(scores + k * kBlock, x);
    select(x < low, x, low, low);
    select(high < x, x, high, high);
  }
  LanesInt a, b, middle, below_low = {}, below_high = LanesInt{} + static_cast<int32_t>(keys - prefix), count;
  ordered((LanesInt)high, b);
  b += 1;
  ordered(b, a);
  high = (Lanes)a;
  for (int step = 0; step < kHalvings + 32; ++step) {
    ordered((LanesInt)low, a);
    ordered((LanesInt)high, b);
    if (all(~active | (below_low == spare) | (a + 1 >= b))) break;
    // Halving values finds its way in few steps where scores are spread; halving bits ends where some are equal.
    Lanes bound = low * 0.5f + high * 0.5f;
    if (step >= kHalvings) {
      middle = (a & b) + ((a ^ b) >> 1);
      ordered(middle, middle);
      bound = (Lanes)middle;
    }
    count_below(scores, prefix, keys, bound, count);
    const LanesInt raise = count <= spare;
    select(raise, bound, low, low);
    select(raise, high, bound, high);
    choose(raise, count, below_low, below_low);
    choose(raise, below_high, count, below_high);
  }
  const LanesInt everything = LanesInt{} + static_cast<int32_t>(keys);
  const Lanes least_score = Lanes{} - kInfinity;
  select(active, low, least_score, choice.threshold);
  choice.last = everything;
  const LanesInt tied = active & (below_low != spare);
  choice.ties = !all(~tied);
  if (!choice.ties) return;
  // Of the keys at the threshold, low, as many as are still wanted: the first ones.
  const LanesInt wanted = below_high - spare;
  LanesInt seen = {};
  for (int64_t k = prefix; k < keys; ++k) {
    load(scores + k * kBlock, x);
    const LanesInt equal = x == low;
    seen -= equal;
    choose(tied & equal & (seen == wanted), LanesInt{} + static_cast<int32_t>(k), choice.last, choice.last);
  }
}

FASTMIM_INLINE void is_chosen(const Choice& choice, const Lanes& score, int64_t key, LanesInt& out) {
  out = ~(score < choice.threshold);
  if (choice.ties) out &= ~((score == choice.threshold) & (choice.last < static_cast<int32_t>(key)));
}

// Turns the bits of sixteen queries over: one register for each word.
FASTMIM_INLINE void write_bits(const LanesInt* words, int64_t count, int64_t queries, uint32_t* to) {
  for (int64_t w = 0; w < count; ++w) {
    int32_t lanes[kLanes];
    memcpy(lanes, words + w, sizeof(lanes));
    for (int64_t i = 0; i < queries; ++i) to[i * count + w] = static_cast<uint32_t>(lanes[i]);
  }
}

FASTMIM_INLINE void read_bits(const uint32_t* from, int64_t count, int64_t queries, LanesInt* words) {
  for (int64_t w = 0; w < count; ++w) {
    int32_t lanes[kLanes] = {};
    for (int64_t i = 0; i < queries; ++i) lanes[i] = static_cast<int32_t>(from[i * count + w]);
    memcpy(words + w, lanes, sizeof(lanes));
  }
}

void choice_bits(const float* scores, int64_t prefix, int64_t keys, const Choice& choice, LanesInt* words) {
  Lanes x;
  LanesInt chosen;
  for (int64_t first = 0; first < keys; first += 32) {
    LanesInt word = {};
    for (int64_t k = first; k < least(first + 32, keys); ++k) {
      chosen = LanesInt{} - 1;
      if (k >= prefix) {
        load(scores + k * kBlock, x);
        is_chosen(choice, x, k, chosen);
      }
      word |= chosen & static_cast<int32_t>(1u << (k - first));
    }
    words[first / 32] = word;
  }
}

// Exponentials of the chosen scores, zeros in place of the others.
FASTMIM_INLINE void exponentials(float* scores, int64_t keys, const LanesInt* words, Lanes& largest, Lanes& sum) {
  const Lanes zero = {};
  Lanes x, e;
  largest = zero - kInfinity;
  for (int64_t k = 0; k < keys; ++k) {
    load(scores + k * kBlock, x);
    select(largest < x, x, largest, largest);
  }
  sum = zero;
  for (int64_t first = 0; first < keys; first += 16) {
    Lanes some = {};
    LanesInt word = words[first / 32] >> static_cast<int32_t>(first % 32);
    for (int64_t k = first; k < least(first + 16, keys); ++k, word >>= 1) {
      float* at = scores + k * kBlock;
      load(at, x);
      x -= largest;
      exponential(x, e);
      select(((word & 1) == 0) | (x < -87.0f), zero, e, e);
      store(at, e);
      some += e;
    }
    sum += some;
  }
}

// How many chosen keys besides itself each query has, and how many of them are of its image; zeros for a prefix.
void count_images(const TopkAttention& p, const LanesInt* words, int64_t b, int64_t query, int64_t queries,
                  int32_t* tally) {
  const int32_t* segments = p.segments + b * (p.heads.keys - p.prefix) - p.prefix;  // by place in the sequence
  int32_t place[kLanes], own[kLanes] = {}, counted[kLanes] = {};
  for (int64_t i = 0; i < kLanes; ++i) place[i] = static_cast<int32_t>(query + i);
  for (int64_t i = query < p.prefix ? p.prefix - query : 0; i < queries; ++i) own[i] = segments[query + i], counted[i] = 1;
  LanesInt self, image, active, same = {}, others = {};
  memcpy(&self, place, sizeof(self));
  memcpy(&image, own, sizeof(image));
  memcpy(&active, counted, sizeof(active));
  for (int64_t k = p.prefix; k < p.heads.keys; ++k) {
    const LanesInt counts = words[k / 32] >> static_cast<int32_t>(k % 32) & active & (self != static_cast<int32_t>(k));
    others += counts;
    same += counts & (image == segments[k]);
  }
  memcpy(own, &same, sizeof(own));
  memcpy(counted, &others, sizeof(counted));
  for (int64_t i = 0; i < queries; ++i) tally[2 * i] = own[i], tally[2 * i + 1] = counted[i];
}

// As forward_head and backward_head want it, for head h of image b.
struct Softmax {
  const TopkAttention& p;
  int64_t b, h;
  LanesInt* words;  // [topk_words(N)]
  bool find;        // the choice, or read it

  void operator()(const Block& block, float* scores, float* reciprocals) const {
    const int64_t tokens = p.heads.keys, row = (b * p.heads.heads + h) * tokens, count = topk_words(tokens);
    for (int64_t q = 0; q < block.lanes; q += 16) {
      const int64_t query = block.first + q, queries = least(16, block.count - q);
      uint32_t* chosen = p.chosen + (row + query) * count;
      if (find) {
        int32_t wanted[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) wanted[i] = i < queries && query + i >= p.prefix ? -1 : 0;
        LanesInt active;
        memcpy(&active, wanted, sizeof(active));
        Choice choice;
        find_choice(scores + q, p.prefix, tokens, p.kept, active, choice);
        choice_bits(scores + q, p.prefix, tokens, choice, words);
        write_bits(words, count, queries, chosen);
        if (p.segments != nullptr) count_images(p, words, b, query, queries, p.tally + 2 * (row + query));
      } else {
        read_bits(chosen, count, queries, words);
      }
      Lanes largest, sum;
      exponentials(scores + q, tokens, words, largest, sum);
      finish_softmax(block, q, largest, sum, reciprocals, find ? p.heads.lse + row : nullptr);
    }
  }
};

// Nothing is added to scores here, so that place is free: a float for a key is twice the room of sixteen queries' bits.
LanesInt* words_of(const Room& room) { return reinterpret_cast<LanesInt*>(room.added); }

}  // namespace

void topk_attention(const TopkAttention& p) {
#pragma omp parallel
  {
    Room room(p.heads);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.heads.batch * p.heads.heads; ++task) {
      const int64_t b = task / p.heads.heads, h = task % p.heads.heads;
      forward_head(p.heads, b, h, room, Softmax{p, b, h, words_of(room), true});
    }
  }
}

void topk_attention_backward(const TopkAttention& p) {
#pragma omp parallel
  {
    Room room(p.heads);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.heads.batch * p.heads.heads; ++task) {
      const int64_t b = task / p.heads.heads, h = task % p.heads.heads;
      backward_head(p.heads, b, h, room, Softmax{p, b, h, words_of(room), false}, [](const Block&, const float*) {});
    }
  }
}

}  // namespace FASTMIM_ISA
}  // namespace fastmim
