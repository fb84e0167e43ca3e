// The tuned backward pass along one run: bands (1, 3), (4, 15) and one more, with few instructions per row.
//
// Up to row-independent terms the gradient at t is own_t * y_t - R_t, where R_t is the sum of the windows' weighted sums
// and own_t the sum of their weights times their counts (docs/kernels.md, "The backward pass of `cuda`"). From row to
// row R changes by what enters and leaves the windows of reach 3 and 15. A window that covers the run is a constant. At
// the run's ends, rows beyond it are replaced by the level, at which y is 0, and own_t by its smaller counts.
#pragma once

#include "gradient.cuh"
#include "mirrored_ring.cuh"

namespace tsae::cuda {

constexpr int kNear = 3, kFar = 15;
constexpr int kShortRun = 16;  // up to this length the window of reach 15 covers the run

// Where eight rows are in the run: its first 8, the next 8, far from both ends, its last 16 to 9, its last 8.
enum class Part { kFirst, kSecond, kInterior, kBeforeLast, kLast };

// The ring of h reaches from 16 rows before the rows in process to 40 rows beyond them. The gradient of h arrives later.
constexpr int kRingRows = 64, kGradRingRows = 32;
constexpr int kAhead = 6;     // batches from the one in process that are in the ring or on their way
constexpr int kGradLag = 2;   // batches by which the gradient is copied later than h

template <class T>
struct Rings {
  MirroredRing<T, kRingRows> h;
  MirroredRing<T, kGradRingRows> grad_h;
  RowFeed<T, kRingRows> feed_h;
  RowFeed<T, kGradRingRows> feed_grad_h;
  int batches;       // of the sequence
  int first_grad_h;  // group in which the copies of grad_h begin
  int whole;         // batches of h that need no checks
  int copied_h = 0;  // batches of h whose copies were started
  int groups = 0;    // group i: batch i of h, unless it was copied before, and batch i - kGradLag of grad_h
  int ready = 0;     // batches of h that have arrived

  static constexpr int kBytes = MirroredRing<T, kRingRows>::kBytes + MirroredRing<T, kGradRingRows>::kBytes;

  __device__ __forceinline__ Rings(const Backward& f, const Place& place)
      : h(shared_memory()), grad_h(shared_memory() + MirroredRing<T, kRingRows>::kBytes),
        feed_h(f.saved, h, f.T, f.k, place), feed_grad_h(f.grad_h, grad_h, f.T, f.k, place),
        batches(batch_of(f.T + kBatch - 1)) {
    whole = f.saved.vectorized && (!f.grad_h.x.data || f.grad_h.vectorized) ? batch_of(f.T) : 0;
    first_grad_h = f.grad_h.x.data ? kGradLag : INT32_MAX;
    if (!f.grad_h.x.data) grad_h.clear();
#pragma unroll 1
    while (groups < smaller(kAhead, batches + kGradLag)) copy_group(place);
  }

  // Before rows t to t + 7 are processed: they, rows up to t + 22 of h and those of grad_h have arrived, and copies into
  // the slots of rows before t - 16 are started. t is at most 8 more than the last time.
  __device__ __forceinline__ void step(int t, const Place& place) {
    const int later = groups - batch_of(t + 2 * kBatch + kFar);  // groups that need not have arrived, if not negative
    if (later >= 2) await_copies_but<2>();
    else if (later == 1) await_copies_but<1>();
    else await_copies_but<0>();
    __syncwarp();
    ready = larger(ready, smaller(batch_of(t + 2 * kBatch + kFar), batches));
    if (groups - batch_of(t) < kAhead) copy_group(place);
  }

  // All rows of h from t on that the ring can hold arrive; returns the first row beyond them. Rows before t are lost.
  __device__ __forceinline__ int fill_from(int t, int end, const Place& place) {
    const int wanted = smaller(batch_of(end + kBatch - 1), batch_of(t) + kRingRows / kBatch);
    __syncwarp();
#pragma unroll 1
    while (copied_h < wanted) feed_h.copy(copied_h++, place);
    await_copies();
    __syncwarp();
    ready = larger(ready, wanted);
    return smaller(ready * kBatch, end);
  }

 private:
  __device__ __forceinline__ void copy_group(const Place& place) {
    if (groups < whole && copied_h == groups) {
      feed_h.copy_whole(groups);
      ++copied_h;
      if (groups >= first_grad_h) feed_grad_h.copy_whole(groups - kGradLag);
    } else {
      if (groups < batches && copied_h == groups) feed_h.copy(copied_h++, place);
      if (groups >= first_grad_h && groups < batches + kGradLag) feed_grad_h.copy(groups - kGradLag, place);
    }
    commit_copies();
    ++groups;
  }
};

// Warps whose rings fit into 227 KB of shared memory, with the 1 KB that the GPU adds.
template <class T>
constexpr int kResidentRings = int((227 << 10) / (Rings<T>::kBytes + 1024));

// What is subtracted from a run's features, and sums of the differences: over the run, or if the third window slides over
// the first `reach` rows; and over the first 15 rows, or the run if that is short.
template <class V>
struct Level {
  V value, sum, of_far;
};

// The walk along one run. kSlides: the third window does not cover the run.
template <class T, Activation activation, bool kSlides>
class WindowWalk {
  using E = compute_of<T>;
  using V = Pair<E>;

  const Backward& f_;
  const Place& place_;
  const Rings<T>& rings_;
  V minus_near_, minus_far_, minus_third_;  // windows' weights, times -kSumScale
  V own_;                           // of y_t, times kSumScale; without windows, of h
  V rest_;                          // -R_t, times kSumScale; without windows, the gradient of the total
  V level_{};
  Stored<T> stored_level_{};
  V near_[kBatch];                  // near_[i]: h at the latest row that is i mod 8, up to row t + 3
  V accumulated_{};
  int begin_, n_;
  bool excluded_;
  char* to_;                        // where grad_pre at the next row goes

 public:
  __device__ __forceinline__ WindowWalk(const Backward& f, const Place& place, const Rings<T>& rings, const Run& run,
                                        const V (&minus_weights)[3], char* to)
      : f_(f), place_(place), rings_(rings), minus_near_(minus_weights[0]), minus_far_(minus_weights[1]),
        minus_third_(minus_weights[2]), begin_(run.begin), n_(run.end - run.begin), excluded_(run.excluded), to_(to) {
    rest_ = f.grad_total && !excluded_ ? moment(f.grad_total) : V{};
    own_ = f.grad_square && !excluded_ ? moment(f.grad_square) * E(2) : V{};
  }

  // The windows before the run's first row. The run's first 18 rows have arrived.
  __device__ __forceinline__ void open(const Level<V>& level) {
    level_ = level.value;
    stored_level_ = narrow<T>(level_);
    const V constant = kSlides ? V{} : minus_third_;
    own_ = own_ * kSumScale<E>;
    rest_ = fused(minus_third_, level.sum, fused(own_, level_, rest_ * kSumScale<E>));
    own_ = own_ - minus_near_ * E(2 * kNear + 1);
    if (kSlides) own_ = own_ - minus_third_ * E(f_.bands[5]);  // rows in the window before the first row
    own_ = own_ - constant * E(n_) - minus_far_ * E(n_ <= kShortRun ? n_ : 2 * kFar + 1);
    rest_ = fused(minus_far_, level.of_far, rest_);
    V near{};
#pragma unroll
    for (int t = 0; t < kBatch; ++t) {
      near_[t] = level_;
      if (t < kNear && t < n_) near_[t] = widen<T>(*at(t)), near = near + (near_[t] - level_);
    }
    rest_ = fused(minus_near_, near, rest_);
    if (n_ < kNear) own_ = own_ + minus_near_;  // n = 2: the first row's window has two rows too few, row by row one more
  }

  // Rows t to t + 7 of a run without window terms.
  __device__ __forceinline__ void plain_rows(int t) {
    const Stored<T>*const row = at(t), *const grad_row = rings_.grad_h.row(begin_ + t);
    const Pre pre(*this, t);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (t + i >= n_) break;
      V h{}, slope{};
      if constexpr (activation == kGelu) {
        const Gelu<T> gelu(pre(i));
        h = widen<T>(gelu.value), slope = gelu.slope;
      } else {
        h = widen<T>(row[i * kLanes]);
      }
      V grad = rest_ + widen<T>(grad_row[i * kLanes]);
      if (f_.grad_square && !excluded_) grad = fused(own_, h, grad);
      write(i, h, slope, grad);
    }
    to_ += int64_t(smaller(kBatch, n_ - t)) * row_bytes();
  }

  // Rows t to t + 7, of which the first n_ - t, or with `bounded` the first `count`.
  template <Part part, bool kBounded, bool kHasFar>
  __device__ __forceinline__ void rows(int t, int count) {
    constexpr bool first = part == Part::kFirst, head = first || part == Part::kSecond;
    constexpr bool last = part == Part::kLast, tail = last || part == Part::kBeforeLast;
    const Stored<T>*const near_row = at(t + kNear), *const far_row = at(t + kFar), *const old_row = at(t - kFar - 1);
    const Stored<T>* const grad_row = rings_.grad_h.row(begin_ + t);
    const Pre pre(*this, t);
    const Third third(*this, t);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (kBounded && i >= count) break;
      const V h = near_[i];
      // The near window.
      const bool near_enters = kBounded ? t + i + kNear < n_ : !last || i < kBatch - kNear;
      Stored<T> in = stored_level_;
      if (near_enters) in = near_row[i * kLanes];
      const V entering = widen<T>(in);
      rest_ = fused(minus_near_, entering - near_[(i + kBatch - kNear - 1) % kBatch], rest_);
      near_[(i + kNear) % kBatch] = entering;
      // The far window.
      const bool far_enters = kBounded ? t + i + kFar < n_ : !tail || (part == Part::kBeforeLast && i == 0);
      if (kHasFar && (kBounded || far_enters || !head)) {
        in = stored_level_;
        if (far_enters) in = far_row[i * kLanes];
        rest_ = fused(minus_far_, widen<T>(in) - (head ? level_ : widen<T>(old_row[i * kLanes])), rest_);
      }
      if constexpr (kSlides) slide_third(third, i);
      // Counts.
      if (kBounded && !near_enters) own_ = own_ + minus_near_;
      if (kBounded && kHasFar && !far_enters) own_ = own_ + minus_far_;
      constexpr int kToEnd = last ? kBatch - 1 : 2 * kBatch - 1;
      const int from_end = first ? i : head ? i + kBatch : kToEnd - i;  // of the run, the nearer one
      const int near_missing = (head || tail) && from_end < kNear ? kNear - from_end : 0;
      const int far_missing = kHasFar && (head || tail) && from_end < kFar ? kFar - from_end : 0;
      V own = own_;
      if (near_missing) own = fused(minus_near_, E(near_missing), own);
      if (far_missing) own = fused(minus_far_, E(far_missing), own);

      V grad = fused(own, h - level_, rest_);
      grad = fused(grad, kInverseSumScale<E>, widen<T>(grad_row[i * kLanes]));
      V slope{};
      if constexpr (activation == kGelu) slope = Gelu<T>(pre(i)).slope;
      write(i, h, slope, grad);
    }
    to_ += int64_t(kBounded ? count : kBatch) * row_bytes();
  }

  // After other than 8 rows: near_ for rows from t on.
  __device__ __forceinline__ void realign(int t) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (i != kNear) near_[i] = widen<T>(*at(i < kNear ? t + i : t + i - kBatch));
    }
  }

  __device__ __forceinline__ const V& accumulated() const { return accumulated_; }
  __device__ __forceinline__ char* next_row() const { return to_; }

 private:
  // For gelu: pre + bias at rows t to t + 7, which the ring does not keep.
  struct Pre {
    Stored<T> rows[kBatch];
    V bias;
    __device__ __forceinline__ Pre(const WindowWalk& walk, int t) {
      if constexpr (activation == kGelu) {
        const Column<T> saved(walk.f_.saved, walk.place_);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          rows[i] = t + i < walk.n_ ? saved.stored(walk.begin_ + t + i) : Stored<T>{};
        }
        bias = walk.f_.bias ? load_numbers<E>(walk.f_.bias, walk.place_.j, walk.place_.count) : V{};
      }
    }
    __device__ __forceinline__ V operator()(int i) const { return widen<T>(rows[i]) + bias; }
  };

  __device__ __forceinline__ const Stored<T>* at(int t) const { return rings_.h.row(begin_ + t); }
  __device__ __forceinline__ int row_bytes() const { return int(f_.k) * int(sizeof(T)); }
  __device__ __forceinline__ V moment(const void* grad) const {
    return load_numbers<E>(grad, place_.b * f_.k + place_.j, place_.count);
  }

  __device__ __forceinline__ void write(int i, const V& h, const V& slope, V grad) {
    if constexpr (activation == kRelu) grad = select(less_equal(h, V{}), V{}, grad);
    if constexpr (activation == kGelu) grad = grad * slope;
    accumulated_ = accumulated_ + grad;
    if (place_.count) *reinterpret_cast<Stored<T>*>(to_ + int64_t(i) * row_bytes()) = narrow<T>(grad);
  }

  // Rows that enter and leave the third window, read from global memory before the stores of eight rows.
  struct Third {
    Stored<T> in[kSlides ? kBatch : 1], out[kSlides ? kBatch : 1];
    int enters, leaves;
    bool both;
    __device__ __forceinline__ Third(const WindowWalk& walk, int t) {
      if constexpr (kSlides) {
        enters = t + walk.f_.bands[5];
        leaves = t - walk.f_.bands[5] - 1;
        both = leaves >= 0 && enters + kBatch <= walk.n_;
        const Source& source = walk.f_.saved;
        const int64_t row_bytes = source.x.time * int64_t(sizeof(T));
        // A thread without features, which only helps to copy, reads those of the first: its own would be past the end.
        const int64_t beyond = walk.place_.count > 0 ? 0 : walk.place_.j - walk.place_.first;
        const T* const h = Column<T>(source, walk.place_).at - beyond * source.x.feature;
        const char* const entering = reinterpret_cast<const char*>(h) + (walk.begin_ + enters) * row_bytes;
        const char* const leaving = reinterpret_cast<const char*>(h) + (walk.begin_ + leaves) * row_bytes;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          in[i] = out[i] = walk.stored_level_;
          if (both || enters + i < walk.n_) in[i] = at(entering, i, row_bytes);
          if (both || leaves + i >= 0) out[i] = at(leaving, i, row_bytes);
        }
      }
    }
    static __device__ __forceinline__ Stored<T> at(const char* row, int i, int64_t row_bytes) {
      return *reinterpret_cast<const Stored<T>*>(row + i * row_bytes);
    }
  };
  __device__ __forceinline__ void slide_third(const Third& third, int i) {
    rest_ = fused(minus_third_, widen<T>(third.in[i]) - widen<T>(third.out[i]), rest_);
    if (third.both) return;
    const bool enters = third.enters + i < n_, leaves = third.leaves + i >= 0;
    if (enters && !leaves) own_ = own_ - minus_third_;
    if (leaves && !enters) own_ = own_ + minus_third_;
  }
};

}  // namespace tsae::cuda
