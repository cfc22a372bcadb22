#include "msdd_fast/copy.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "msdd_fast/check.h"
#include "msdd_fast/detail/parallel.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t COPY_GRAIN_ELEMENTS = 1 << 14;

template <class To>
To converted(float value) {
    if constexpr (std::is_same_v<To, std::uint8_t>)
        return to_byte(value);
    else
        return from_float<To>(value);
}

constexpr std::int64_t bytes_of(PixelType type) {
    return type == PixelType::uint8 ? 1 : size_of(static_cast<DType>(type));
}

template <class To, class From>
void copy_row(To* __restrict to, const From* __restrict from, std::int64_t count, std::int64_t to_stride,
              std::int64_t from_stride) {
    for (std::int64_t i = 0; i < count; ++i) to[i * to_stride] = converted<To>(to_float(from[i * from_stride]));
}

struct Job {
    char* out;
    const char* x;
    std::int64_t out_size, x_size;
    PixelType out_type;
    DType x_dtype;
    CopyShape shape;

    // One run of the innermost dimension.
    void row(std::int64_t to, std::int64_t from) const {
        const int last = shape.dimensions - 1;
        const std::int64_t count = shape.sizes[last], to_stride = shape.to[last], from_stride = shape.from[last];
        char* const target = out + to * out_size;
        if (x == nullptr) {
            if (to_stride == 1) {
                std::memset(target, 0, static_cast<std::size_t>(count * out_size));
                return;
            }
            for (std::int64_t i = 0; i < count; ++i)
                std::memset(target + i * to_stride * out_size, 0, static_cast<std::size_t>(out_size));
            return;
        }
        const char* const source = x + from * x_size;
        if (out_type == static_cast<PixelType>(x_dtype)) {
            if (to_stride == 1 && from_stride == 1) {
                std::memcpy(target, source, static_cast<std::size_t>(count * out_size));
                return;
            }
            for (std::int64_t i = 0; i < count; ++i)
                std::memcpy(target + i * to_stride * out_size, source + i * from_stride * x_size,
                            static_cast<std::size_t>(out_size));
            return;
        }
        const auto from_type = [&](auto* to_type) {
            with_type(x_dtype, [&](auto* type) {
                using To = std::remove_pointer_t<decltype(to_type)>;
                using From = std::remove_pointer_t<decltype(type)>;
                copy_row(reinterpret_cast<To*>(target), reinterpret_cast<const From*>(source), count, to_stride,
                         from_stride);
            });
        };
        if (out_type == PixelType::uint8) return from_type(static_cast<std::uint8_t*>(nullptr));
        with_type(static_cast<DType>(out_type), from_type);
    }

    template <class Body>
    static void with_type(DType dtype, const Body& body) {
        switch (dtype) {
            case DType::float32:
                return body(static_cast<float*>(nullptr));
            case DType::bfloat16:
                return body(static_cast<BFloat16*>(nullptr));
            case DType::float16:
                return body(static_cast<Float16*>(nullptr));
        }
    }

    // Rows begin to end of the outer dimensions, counted row-major.
    void rows(std::int64_t begin, std::int64_t end) const {
        for (std::int64_t r = begin; r < end; ++r) {
            std::int64_t left = r, to = 0, from = 0;
            for (int d = shape.dimensions - 2; d >= 0; --d) {
                const std::int64_t i = left % shape.sizes[d];
                left /= shape.sizes[d];
                to += i * shape.to[d];
                from += i * shape.from[d];
            }
            row(to, from);
        }
    }
};

// Without dimensions of one element, and with neighbours joined that are one run in both tensors.
CopyShape simplified(const CopyShape& shape) {
    CopyShape result;
    for (int d = 0; d < shape.dimensions; ++d) {
        if (shape.sizes[d] == 1) continue;
        const int last = result.dimensions - 1;
        if (last >= 0 && result.to[last] == shape.to[d] * shape.sizes[d] &&
            result.from[last] == shape.from[d] * shape.sizes[d]) {
            result.sizes[last] *= shape.sizes[d];
            result.to[last] = shape.to[d];
            result.from[last] = shape.from[d];
            continue;
        }
        result.sizes[result.dimensions] = shape.sizes[d];
        result.to[result.dimensions] = shape.to[d];
        result.from[result.dimensions] = shape.from[d];
        ++result.dimensions;
    }
    if (result.dimensions == 0) {
        result.dimensions = 1;
        result.sizes[0] = result.to[0] = result.from[0] = 1;
    }
    return result;
}

}  // namespace

void copy(void* out, PixelType out_type, const void* x, DType x_dtype, const CopyShape& shape, int threads) {
    expect_threads(threads);
    expect(shape.dimensions >= 0 && shape.dimensions <= MAX_COPY_DIMENSIONS, "tensors must have at most 8 dimensions");
    for (int d = 0; d < shape.dimensions; ++d)
        if (shape.sizes[d] == 0) return;
    expect(out != nullptr, "out is missing");
    Job job{
        static_cast<char*>(out), static_cast<const char*>(x), bytes_of(out_type), size_of(x_dtype), out_type, x_dtype,
        simplified(shape)};
    CopyShape& s = job.shape;
    // One long run is cut, so that threads can share it.
    if (s.dimensions == 1 && s.sizes[0] >= 2 * COPY_GRAIN_ELEMENTS) {
        constexpr std::int64_t PIECE = COPY_GRAIN_ELEMENTS;
        const std::int64_t whole = s.sizes[0] / PIECE, rest = s.sizes[0] % PIECE;
        const std::int64_t to = s.to[0], from = s.from[0];
        Job tail = job;
        tail.shape.sizes[0] = rest;
        if (rest > 0) tail.row(whole * PIECE * to, whole * PIECE * from);
        s = {2, {whole, PIECE}, {PIECE * to, to}, {PIECE * from, from}};
    }
    std::int64_t rows = 1;
    for (int d = 0; d + 1 < s.dimensions; ++d) rows *= s.sizes[d];
    const std::int64_t width = s.sizes[s.dimensions - 1];
    parallel_for(rows, std::max<std::int64_t>(1, COPY_GRAIN_ELEMENTS / width), threads,
                 [&](std::int64_t begin, std::int64_t end) { job.rows(begin, end); });
}

}  // namespace msdd_fast
