#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "cpu/dispatch.h"
#include "cpu/rows.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace guda_fast::cpu {
namespace {

constexpr const char* kOp = "attention";
constexpr std::int64_t kMaxElements = std::int64_t{1} << 40;
constexpr std::align_val_t kVector{4 * kLanes};

struct Free {
  void operator()(float* memory) const { ::operator delete(memory, kVector); }
};

// What a thread works on: the packed keys and values of one (row, head) pair.
struct Workspace {
  std::int64_t pair = -1;
  std::unique_ptr<float, Free> memory;
  float *scratch, *k, *v;

  Workspace(std::int64_t packed, std::int64_t dim)
      : memory(static_cast<float*>(::operator new(
            static_cast<std::size_t>(2 * packed + (3 * dim + 4) * kLanes) * sizeof(float), kVector))),
        scratch(memory.get()),
        k(scratch + (3 * dim + 4) * kLanes),
        v(k + packed) {}
};

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

class Runner {
 public:
  Runner(const Attention& call, Dtype dtype, const Kernels& kernels)
      : call_(call),
        pack_(kernels.pack_keys[static_cast<int>(dtype)]),
        attend_(kernels.attend[static_cast<int>(dtype)]),
        bytes_(dtype == Dtype::float32 ? 4 : 2) {}

  void pack(Workspace& work, std::int64_t pair) const {
    if (work.pair == pair) return;
    work.pair = pair;
    pack_(work.k, at(call_.k, call_.k_layout, pair, 0), call_.k_layout.position_stride, call_.keys,
          call_.dim);
    pack_(work.v, at(call_.v, call_.v_layout, pair, 0), call_.v_layout.position_stride, call_.keys,
          call_.dim);
  }

  void attend(const Workspace& work, std::int64_t pair, std::int64_t first, std::int64_t last) const {
    attend_({at(call_.out, call_.out_layout, pair, first), call_.out_layout.position_stride,
             at(call_.q, call_.q_layout, pair, first), call_.q_layout.position_stride, last - first,
             call_.keys, call_.dim, call_.scale * 1.4426950408889634, work.k, work.v, work.scratch});
  }

 private:
  template <typename Void>
  Void* at(Void* data, const Heads& layout, std::int64_t pair, std::int64_t position) const {
    using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
    const std::int64_t offset = pair / call_.heads * layout.row_stride +
                                pair % call_.heads * layout.head_stride + position * layout.position_stride;
    return static_cast<Byte*>(data) + offset * bytes_;
  }

  const Attention& call_;
  PackKeys pack_;
  Attend attend_;
  std::int64_t bytes_;
};

// Waking a team costs some microseconds, which is what this much work costs.
int useful_threads(const Attention& call, int threads) {
  constexpr double kWorkPerThread = 1 << 18;
  const double scores = static_cast<double>(call.rows * call.heads) * static_cast<double>(call.queries) *
                        static_cast<double>(call.keys);
  const double useful = scores * static_cast<double>(call.dim + 8) / kWorkPerThread;
  return static_cast<int>(std::clamp(useful, 1.0, static_cast<double>(threads)));
}

// A unit of work is some queries of a pair. A thread takes neighbouring units, and packs a pair's keys once.
void run(const Runner& runner, const Attention& call, int threads) {
  const std::int64_t pairs = call.rows * call.heads, tiles = (call.queries + kLanes - 1) / kLanes;
  const std::int64_t wanted = (4 * std::int64_t{threads} + pairs - 1) / pairs;  // units, for even shares
  const std::int64_t parts = threads == 1 ? 1 : std::min(wanted, tiles);
  const std::int64_t packed = (call.keys + kKeyBlock - 1) / kKeyBlock * kKeyBlock * call.dim;
  std::vector<Workspace> workspaces;
  for (int thread = 0; thread < threads; ++thread) workspaces.emplace_back(packed, call.dim);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (std::int64_t unit = 0; unit < pairs * parts; ++unit) {
    Workspace& work = workspaces[static_cast<std::size_t>(thread_number())];
    const std::int64_t pair = unit / parts, part = unit % parts;
    runner.pack(work, pair);
    runner.attend(work, pair, tiles * part / parts * kLanes,
                  std::min(tiles * (part + 1) / parts * kLanes, call.queries));
  }
}

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  require(name == "bfloat16", kOp, ": dtype must be one of 'float32', 'bfloat16', got '", name, "'");
  return Dtype::bfloat16;
}

void check_elements(const Attention& call, const char* name, std::int64_t positions) {
  std::int64_t elements = 1;
  for (const std::int64_t size : {call.rows, call.heads, positions, call.dim}) {
    require(size == 0 || elements <= kMaxElements / size, kOp, ": ", name,
            " must have at most 2**40 elements");
    elements *= std::max(size, std::int64_t{1});
  }
}

void check_sizes(const Attention& call) {
  require(call.rows >= 0, kOp, ": rows must be at least 0, got ", call.rows);
  require(call.heads >= 0, kOp, ": heads must be at least 0, got ", call.heads);
  require(call.queries >= 0, kOp, ": queries must be at least 0, got ", call.queries);
  require(call.keys >= 1, kOp, ": keys must be at least 1, got ", call.keys);
  require(call.dim >= 0, kOp, ": dim must be at least 0, got ", call.dim);
  check_elements(call, "q", call.queries);
  check_elements(call, "k", call.keys);
  require(call.scale >= 0.0 && std::isfinite(call.scale), kOp, ": scale must be finite and at least 0, got ",
          call.scale);
}

void check_tensor(const Attention& call, const char* name, const void* data, const Heads& layout,
                  std::int64_t positions, std::uintptr_t alignment) {
  require(data != nullptr, kOp, ": ", name, " must not be a null pointer");
  require(reinterpret_cast<std::uintptr_t>(data) % alignment == 0, kOp, ": ", name, " must be aligned to ",
          alignment, " bytes");
  check_reach(kOp, join(name, "_strides").c_str(), {call.rows, call.heads}, {positions},
              {layout.row_stride, layout.head_stride, layout.position_stride});
}

// Each stride steps over all that the smaller ones reach.
void check_no_overlap(const Attention& call) {
  std::pair<std::int64_t, std::int64_t> steps[] = {{call.out_layout.row_stride, call.rows},
                                                   {call.out_layout.head_stride, call.heads},
                                                   {call.out_layout.position_stride, call.queries}};
  std::sort(std::begin(steps), std::end(steps));
  std::int64_t reach = call.dim;
  for (const auto& [stride, size] : steps) {
    if (size == 1) continue;
    require(stride >= reach, kOp, ": out_strides must not let elements overlap");
    reach += (size - 1) * stride;
  }
}

}  // namespace

void attention(const Attention& call, int threads) {
  const Dtype dtype = parse_dtype(call.dtype);
  check_sizes(call);
  check_threads(kOp, threads);
  if (call.rows == 0 || call.heads == 0 || call.queries == 0 || call.dim == 0) return;
  const std::uintptr_t alignment = dtype == Dtype::float32 ? 4 : 2;
  check_tensor(call, "out", call.out, call.out_layout, call.queries, alignment);
  check_tensor(call, "q", call.q, call.q_layout, call.queries, alignment);
  check_tensor(call, "k", call.k, call.k_layout, call.keys, alignment);
  check_tensor(call, "v", call.v, call.v_layout, call.keys, alignment);
  check_no_overlap(call);
  run(Runner(call, dtype, kernels()), call, useful_threads(call, threads));
}

}  // namespace guda_fast::cpu
