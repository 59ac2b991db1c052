// Depthwise convolution and batch normalisation for training on a CPU, on channels-last tensors [N, H, W, C].
//
// Only raw convolution outputs reach memory. A convolution applies the norm and activation of its input while it copies the
// input into a small padded plane, and a backward pass recomputes them the same way. Statistics are taken per image
// and merged in the order of the images, so no result depends on the number of threads.
//
// Compiled at first use by kernels/cpu/native.py, for float and double.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif

constexpr int kPixels = 4;   // outputs of a row computed together: 4 x 2 accumulators, 2 weights, in 16 registers
constexpr int kGroups = 32;  // the images are split into so many tasks at most, each with its own sums

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(kVectorBytes)));
    static constexpr int lanes = kVectorBytes / sizeof(T);
    static constexpr int block = 2 * lanes;  // channels computed together
};

template <class T>
using Vec = typename Vector<T>::type;

template <class T>
inline Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
    std::memcpy(p, &v, sizeof v);
}

// The first `count` lanes, any number, of which none is above the vector's own: the others read as zero and are not
// written. Masked instructions where the processor has them: a copy of a few bytes costs several times as much.
#if defined(__AVX512F__)
inline Vec<float> load_some(const float* p, int count) {
    return Vec<float>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
}
inline Vec<double> load_some(const double* p, int count) {
    return Vec<double>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p));
}
inline void store_some(float* p, Vec<float> v, int count) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), __m512(v));
}
inline void store_some(double* p, Vec<double> v, int count) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), __m512d(v));
}
#elif defined(__AVX2__)
inline __m256i lanes_before(const float*, int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lanes_before(const double*, int count) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vec<float> load_some(const float* p, int count) {
    return Vec<float>(_mm256_maskload_ps(p, lanes_before(p, count)));
}
inline Vec<double> load_some(const double* p, int count) {
    return Vec<double>(_mm256_maskload_pd(p, lanes_before(p, count)));
}
inline void store_some(float* p, Vec<float> v, int count) {
    _mm256_maskstore_ps(p, lanes_before(p, count), __m256(v));
}
inline void store_some(double* p, Vec<double> v, int count) {
    _mm256_maskstore_pd(p, lanes_before(p, count), __m256d(v));
}
#else
template <class T>
inline Vec<T> load_some(const T* p, int count) {
    Vec<T> v{};
    std::memcpy(&v, p, count * sizeof(T));
    return v;
}
template <class T>
inline void store_some(T* p, Vec<T> v, int count) {
    std::memcpy(p, &v, count * sizeof(T));
}
#endif

// Two vectors of which the first `valid` lanes are meant; the others read as zero and are not written.
template <class T>
struct Pair {
    static constexpr int lanes = Vector<T>::lanes;
    Vec<T> a, b;

    static Pair zero() { return {Vec<T>{}, Vec<T>{}}; }
    static Pair read(const T* p, int valid) {
        if (valid == 2 * lanes) return {load(p), load(p + lanes)};
        return {load_some(p, std::min(valid, lanes)), load_some(p + lanes, std::max(valid - lanes, 0))};
    }
    void write(T* p, int valid) const {
        if (valid == 2 * lanes) {
            store(p, a);
            store(p + lanes, b);
            return;
        }
        store_some(p, a, std::min(valid, lanes));
        store_some(p + lanes, b, std::max(valid - lanes, 0));
    }
};

template <class T>
inline Pair<T> operator+(Pair<T> x, Pair<T> y) { return {x.a + y.a, x.b + y.b}; }
template <class T>
inline Pair<T> operator-(Pair<T> x, Pair<T> y) { return {x.a - y.a, x.b - y.b}; }
template <class T>
inline Pair<T> operator*(Pair<T> x, Pair<T> y) { return {x.a * y.a, x.b * y.b}; }

// ReLU6 (bound 6), ReLU (an infinite bound), or nothing (a negative one). NaN stays NaN.
template <class T>
struct Activation {
    Vec<T> bound;
    bool given;

    explicit Activation(double most) : bound(Vec<T>{} + T(most)), given(most >= 0) {}
    Vec<T> operator()(Vec<T> v) const {
        const Vec<T> zero{};
        v = v < zero ? zero : v;
        return v > bound ? bound : v;
    }
    // A gradient where it is let through: strictly between zero and the bound.
    Vec<T> pass(Vec<T> gradient, Vec<T> z) const {
        const Vec<T> zero{};
        return (z > zero) & (z < bound) ? gradient : zero;
    }
    Pair<T> operator()(Pair<T> x) const { return {(*this)(x.a), (*this)(x.b)}; }
    Pair<T> pass(Pair<T> gradient, Pair<T> z) const { return {pass(gradient.a, z.a), pass(gradient.b, z.b)}; }
};

struct Shape {
    int64_t images, height, width, channels, stride;
    double most;  // the activation's bound, of the input's norm and of the output's
    int64_t out_height() const { return (height - 1) / stride + 1; }
    int64_t out_width() const { return (width - 1) / stride + 1; }
};

// One channel block of a norm: z = scale * y + shift.
template <class T>
struct Affine {
    Pair<T> scale, shift;
    bool given;

    Affine(const T* scales, const T* shifts, int64_t channel, int valid) : given(scales != nullptr) {
        scale = given ? Pair<T>::read(scales + channel, valid) : Pair<T>::zero();
        shift = given ? Pair<T>::read(shifts + channel, valid) : Pair<T>::zero();
    }
    Pair<T> operator()(Pair<T> y) const { return y * scale + shift; }
};

// Fetch an image into the second-level cache, in its own order: the loops below take it a channel block at a time, in
// steps that hardware does not foresee. 11 to 38 % less time for a depthwise backward pass of larger maps (EPYC, Zen 5).
template <class T>
inline void prefetch(const T* image, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(image + i, 0, 2);
}

template <class T, class Function>
inline void for_channel_blocks(int64_t channels, Function function) {
    for (int64_t channel = 0; channel < channels; channel += Vector<T>::block)
        function(channel, int(std::min<int64_t>(Vector<T>::block, channels - channel)));
}

// ---- sums over one image

// Mean and sum of squared deviations, from sums shifted by the first value, which keeps float accurate where the mean
// is large against the spread.
template <class T>
struct Moments {
    Pair<T> first = Pair<T>::zero(), sum = first, squares = first;

    void start(Pair<T> value) { first = value, sum = squares = Pair<T>::zero(); }
    void add(Pair<T> value) {
        const Pair<T> d = value - first;
        sum = sum + d;
        squares = squares + d * d;
    }
    void write(double* mean, double* m2, int64_t count, int valid) const {
        constexpr int block = Vector<T>::block;
        T f[block], s[block], q[block];
        first.write(f, block), sum.write(s, block), squares.write(q, block);
        for (int i = 0; i < valid; ++i) {
            mean[i] = double(f[i]) + double(s[i]) / count;
            m2[i] = std::max(double(q[i]) - double(s[i]) * s[i] / count, 0.0);
        }
    }
};

template <class T>
void add_to(double* sums, Pair<T> value, int valid) {
    T values[Vector<T>::block];
    value.write(values, Vector<T>::block);
    for (int i = 0; i < valid; ++i) sums[i] += values[i];
}

// ---- depthwise convolution

template <class T>
struct Plane {  // one image and channel block with a margin of zeros
    std::vector<T> data;
    int64_t columns;

    Plane(int64_t rows, int64_t columns) : data(rows * columns * Vector<T>::block), columns(columns) {}
    T* at(int64_t row, int64_t column) { return data.data() + (row * columns + column) * Vector<T>::block; }
};

// [C, K, K] -> [blocks, K * K, block]: the taps of a channel block side by side.
template <class T>
std::vector<T> packed_taps(const T* weight, int taps, int64_t channels) {
    constexpr int block = Vector<T>::block;
    std::vector<T> packed((channels + block - 1) / block * taps * block);
    for (int64_t c = 0; c < channels; ++c)
        for (int t = 0; t < taps; ++t) packed[(c / block * taps + t) * block + c % block] = weight[c * taps + t];
    return packed;
}

template <class T, int K>
void load_input(const Shape& s, const T* image, int64_t channel, int valid, const Affine<T>& norm, Plane<T>& plane) {
    const Activation<T> activation(s.most);
    for (int64_t h = 0; h < s.height; ++h)
        for (int64_t w = 0; w < s.width; ++w) {
            Pair<T> v = Pair<T>::read(image + (h * s.width + w) * s.channels + channel, valid);
            if (norm.given) v = activation(norm(v));
            v.write(plane.at(h + K / 2, w + K / 2), Vector<T>::block);
        }
}

// kPixels neighbouring sums over a row of the window: taps[j] * row[pixel * S + j] for j in [from, to), taps `step` apart.
template <class T, int S>
inline void add_row(const T* row, const T* taps, int step, int from, int to, Pair<T> (&sums)[kPixels]) {
    constexpr int lanes = Vector<T>::lanes, block = Vector<T>::block;
    for (int j = from; j < to; ++j) {
        const Vec<T> a = load(taps + j * step), b = load(taps + j * step + lanes);
        for (int p = 0; p < kPixels; ++p) {
            const T* x = row + (p * S + j) * block;
            sums[p].a += load(x) * a;
            sums[p].b += load(x + lanes) * b;
        }
    }
}

// The columns j of a window of K that meet the image's `width` columns for any of kPixels outputs S columns apart, the
// first of whose windows begins at column `begin`, counted from the image's first. The others see only zeros.
struct Taps {
    int from, to;
    Taps(int64_t begin, int64_t width, int K, int S)
        : from(int(std::max<int64_t>(0, -begin - (kPixels - 1) * S))), to(int(std::min<int64_t>(K, width - begin))) {}
};

// x [N, H, W, C], weight [C, K, K] -> y [N, OH, OW, C]; per image the mean and squared deviations of y, if asked for.
template <class T, int K, int S>
void depthwise_forward(const Shape& s, const T* x, const T* scale, const T* shift, const T* weight, T* y, double* mean,
                       double* m2, int threads) {
    constexpr int block = Vector<T>::block;
    const int64_t out_h = s.out_height(), out_w = s.out_width();
    const int64_t columns = std::max(s.width + K - 1, ((out_w + kPixels - 1) / kPixels * kPixels - 1) * S + K);
    const int64_t in_size = s.height * s.width * s.channels;
    const std::vector<T> packed = packed_taps(weight, K * K, s.channels);
#pragma omp parallel num_threads(threads)
    {
        Plane<T> plane(s.height + K - 1 + S, columns);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < s.images; ++n) {
            prefetch(x + n * in_size, in_size);
            for_channel_blocks<T>(s.channels, [&](int64_t channel, int valid) {
                const Affine<T> norm(scale, shift, channel, valid);
                const T* taps = &packed[channel * K * K];
                load_input<T, K>(s, x + n * in_size, channel, valid, norm, plane);
                T* out = y + n * out_h * out_w * s.channels + channel;
                Moments<T> moments;
                for (int64_t h = 0; h < out_h; ++h)
                    for (int64_t w = 0; w < out_w; w += kPixels) {
                        Pair<T> sums[kPixels] = {};
                        const Taps j(w * S - K / 2, s.width, K, S);
                        for (int i = 0; i < K; ++i) {
                            const int64_t row = h * S + i - K / 2;
                            if (row < 0 || row >= s.height) continue;
                            add_row<T, S>(plane.at(row + K / 2, w * S), taps + i * K * block, block, j.from, j.to, sums);
                        }
                        if (h == 0 && w == 0) moments.start(sums[0]);
                        const int64_t pixels = std::min<int64_t>(kPixels, out_w - w);
                        for (int64_t p = 0; p < pixels; ++p) {
                            moments.add(sums[p]);
                            sums[p].write(out + (h * out_w + w + p) * s.channels, valid);
                        }
                    }
                if (mean != nullptr)
                    moments.write(mean + n * s.channels + channel, m2 + n * s.channels + channel, out_h * out_w, valid);
            });
        }
    }
}

// The gradient of the raw output, dy = a * dz + b * y + c with dz let through by the output's activation, S columns apart.
template <class T, int K, int S>
void load_gradient(const Shape& s, const T* dz, const T* y, int64_t channel, int valid, const Affine<T>& norm,
                   const Pair<T> (&coefficients)[3], Plane<T>& plane) {
    const int64_t out_h = s.out_height(), out_w = s.out_width();
    const Activation<T> activation(s.most);
    for (int64_t h = 0; h < out_h; ++h)
        for (int64_t w = 0; w < out_w; ++w) {
            const int64_t at = (h * out_w + w) * s.channels + channel;
            const Pair<T> raw = Pair<T>::read(y + at, valid);
            const Pair<T> gradient = activation.pass(Pair<T>::read(dz + at, valid), norm(raw));
            const Pair<T> dy = coefficients[0] * gradient + coefficients[1] * raw + coefficients[2];
            dy.write(plane.at(h, w * S + K / 2), Vector<T>::block);
        }
}

// dW[i, j] += sum over the image of dy[h, w] * x[h * S + i, w * S + j].
template <class T, int K, int S>
void add_weight_gradient(const Shape& s, Plane<T>& input, Plane<T>& gradient, T* sums) {
    constexpr int lanes = Vector<T>::lanes, block = Vector<T>::block;
    for (int i = 0; i < K; ++i) {
        T* at = sums + i * K * block;
        Pair<T> row_sums[K];
        for (int j = 0; j < K; ++j) row_sums[j] = Pair<T>::read(at + j * block, block);
        for (int64_t h = 0; h < s.out_height(); ++h) {
            const int64_t row = h * S + i - K / 2;
            if (row < 0 || row >= s.height) continue;
            const T* dy = gradient.at(h, K / 2);
            const T* x = input.at(row + K / 2, 0);
            for (int64_t w = 0; w < s.out_width(); ++w, dy += S * block, x += S * block) {
                const Vec<T> a = load(dy), b = load(dy + lanes);
                for (int j = 0; j < K; ++j) {
                    row_sums[j].a += a * load(x + j * block);
                    row_sums[j].b += b * load(x + j * block + lanes);
                }
            }
        }
        for (int j = 0; j < K; ++j) row_sums[j].write(at + j * block, block);
    }
}

// dx of the convolution, through the input's activation where it has a norm, and the two sums of that norm's own backward.
template <class T, int K, int S>
void input_gradient(const Shape& s, const T* x, int64_t channel, int valid, const Affine<T>& norm, Pair<T> mean,
                    const T* taps, Plane<T>& gradient, T* dx, double* sum, double* product) {
    constexpr int block = Vector<T>::block;
    const Activation<T> activation(s.most);
    Pair<T> sum_dz = Pair<T>::zero(), sum_dz_y = Pair<T>::zero();
    for (int64_t h = 0; h < s.height; ++h)
        for (int64_t w = 0; w < s.width; w += kPixels) {
            Pair<T> sums[kPixels] = {};
            const Taps j(w - K / 2, (s.out_width() - 1) * S + 1, K, 1);
            for (int i = 0; i < K; ++i) {
                const int64_t row = h + K / 2 - i;
                if (row < 0 || row % S != 0 || row / S >= s.out_height()) continue;
                add_row<T, 1>(gradient.at(row / S, w), taps + (i * K + K - 1) * block, -block, j.from, j.to, sums);
            }
            const int64_t pixels = std::min<int64_t>(kPixels, s.width - w);
            for (int64_t p = 0; p < pixels; ++p) {
                const int64_t at = (h * s.width + w + p) * s.channels + channel;
                if (norm.given) {
                    const Pair<T> raw = Pair<T>::read(x + at, valid);
                    sums[p] = activation.pass(sums[p], norm(raw));
                    sum_dz = sum_dz + sums[p];
                    sum_dz_y = sum_dz_y + sums[p] * (raw - mean);
                }
                sums[p].write(dx + at, valid);
            }
        }
    if (norm.given) {
        add_to<T>(sum, sum_dz, valid);
        add_to<T>(product, sum_dz_y, valid);
    }
}

template <class T>
struct Backward {
    const T *dz, *y, *y_scale, *y_shift, *coefficients;  // of the output: coefficients [3, C]
    const T *x, *x_scale, *x_shift, *x_mean;             // of the input: null where it has no norm
    const T* weight;
    T *dx, *d_weight;
    double *sum, *product;  // [C] each, over dz and dz * (x - mean) of the input's norm
};

template <class T, int K, int S>
void depthwise_backward(const Shape& s, const Backward<T>& t, int threads) {
    constexpr int block = Vector<T>::block, taps_size = K * K * block;
    // No more weight gradients than there are pixels to add up, but tasks enough for some cores.
    const int64_t most = std::clamp<int64_t>(s.images * s.height * s.width / (K * K), 8, kGroups);
    const int64_t groups = std::min(most, s.images), blocks = (s.channels + block - 1) / block;
    const int64_t in_size = s.height * s.width * s.channels, out_size = s.out_height() * s.out_width() * s.channels;
    const std::vector<T> packed = packed_taps(t.weight, K * K, s.channels);
    std::vector<T> partial(groups * blocks * taps_size);
    std::vector<double> sums(groups * 2 * s.channels);
    const int64_t columns = (s.width + kPixels - 1) / kPixels * kPixels + K - 1 + S;
#pragma omp parallel num_threads(threads)
    {
        Plane<T> input(s.height + K - 1 + S, s.width + K - 1 + S), gradient(s.out_height(), columns);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; ++group)
            for (int64_t n = group * s.images / groups; n < (group + 1) * s.images / groups; ++n) {
                prefetch(t.x + n * in_size, in_size);
                prefetch(t.dz + n * out_size, out_size);
                prefetch(t.y + n * out_size, out_size);
                for_channel_blocks<T>(s.channels, [&](int64_t channel, int valid) {
                    const Affine<T> in_norm(t.x_scale, t.x_shift, channel, valid);
                    const Affine<T> out_norm(t.y_scale, t.y_shift, channel, valid);
                    Pair<T> coefficients[3];
                    for (int i = 0; i < 3; ++i)
                        coefficients[i] = Pair<T>::read(t.coefficients + i * s.channels + channel, valid);
                    const Pair<T> mean = in_norm.given ? Pair<T>::read(t.x_mean + channel, valid) : Pair<T>::zero();
                    load_input<T, K>(s, t.x + n * in_size, channel, valid, in_norm, input);
                    load_gradient<T, K, S>(s, t.dz + n * out_size, t.y + n * out_size, channel, valid, out_norm,
                                           coefficients, gradient);
                    add_weight_gradient<T, K, S>(s, input, gradient,
                                                 &partial[(group * blocks + channel / block) * taps_size]);
                    double* sum = &sums[group * 2 * s.channels + channel];
                    input_gradient<T, K, S>(s, t.x + n * in_size, channel, valid, in_norm, mean,
                                            &packed[channel * K * K], gradient, t.dx + n * in_size, sum,
                                            sum + s.channels);
                });
            }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < blocks * K * K; ++at) {
            double total[block] = {};
            for (int64_t group = 0; group < groups; ++group)
                for (int i = 0; i < block; ++i) total[i] += partial[(group * blocks * K * K + at) * block + i];
            const int64_t channel = at / (K * K) * block, tap = at % (K * K);
            for (int i = 0; i < block && channel + i < s.channels; ++i)
                t.d_weight[(channel + i) * K * K + tap] = T(total[i]);
        }
#pragma omp for schedule(static)
        for (int64_t channel = 0; channel < s.channels; ++channel) {
            t.sum[channel] = t.product[channel] = 0;
            for (int64_t group = 0; group < groups; ++group) {
                t.sum[channel] += sums[group * 2 * s.channels + channel];
                t.product[channel] += sums[(group * 2 + 1) * s.channels + channel];
            }
        }
    }
}

// ---- batch normalisation

// y [N, pixels, C] -> mean and sum of squared deviations of every image and channel.
template <class T>
void image_moments(int64_t images, int64_t pixels, int64_t channels, const T* y, double* mean, double* m2,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < images; ++n)
        for_channel_blocks<T>(channels, [&](int64_t channel, int valid) {
            const T* at = y + n * pixels * channels + channel;
            Moments<T> moments;
            moments.start(Pair<T>::read(at, valid));
            for (int64_t p = 0; p < pixels; ++p, at += channels) moments.add(Pair<T>::read(at, valid));
            moments.write(mean + n * channels + channel, m2 + n * channels + channel, pixels, valid);
        });
}

template <class T>
struct Norm {
    const T *weight, *bias;
    T *running_mean, *running_var;  // null where there are none
    double momentum, eps;
    T *mean, *rstd, *scale, *shift;  // results, [C]
};

// The statistics of a batch from those of its images, as torch.nn.BatchNorm2d has them, and the running ones' update.
template <class T>
void finalize(int64_t images, int64_t pixels, int64_t channels, const double* means, const double* m2s,
              const Norm<T>& norm) {
    std::vector<double> mean(means, means + channels), m2(m2s, m2s + channels);
    for (int64_t n = 1; n < images; ++n)
        for (int64_t c = 0; c < channels; ++c) {
            const double delta = means[n * channels + c] - mean[c];
            mean[c] += delta / (n + 1);
            m2[c] += m2s[n * channels + c] + delta * delta * pixels * n / (n + 1);
        }
    const double count = double(images) * pixels;
    for (int64_t c = 0; c < channels; ++c) {
        const double var = m2[c] / count, rstd = 1 / __builtin_sqrt(var + norm.eps);
        norm.mean[c] = T(mean[c]);
        norm.rstd[c] = T(rstd);
        norm.scale[c] = T(norm.weight[c] * rstd);
        norm.shift[c] = T(norm.bias[c] - mean[c] * norm.weight[c] * rstd);
        if (norm.running_mean == nullptr) continue;
        norm.running_mean[c] += T(norm.momentum * (mean[c] - norm.running_mean[c]));
        norm.running_var[c] += T(norm.momentum * (m2[c] / (count - 1) - norm.running_var[c]));
    }
}

// z = scale * y + shift, then the activation (none where `most` is negative) or + shortcut.
template <class T>
void apply(int64_t rows, int64_t channels, const T* y, const T* scale, const T* shift, const T* shortcut, double most,
           T* z, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        for_channel_blocks<T>(channels, [&](int64_t channel, int valid) {
            const Activation<T> activation(most);
            const int64_t at = row * channels + channel;
            Pair<T> v = Affine<T>(scale, shift, channel, valid)(Pair<T>::read(y + at, valid));
            if (activation.given) v = activation(v);
            if (shortcut != nullptr) v = v + Pair<T>::read(shortcut + at, valid);
            v.write(z + at, valid);
        });
}

// The sums of a norm's backward: over dz, let through by the activation where there is one, and over dz * (y - mean).
template <class T>
void gradient_sums(int64_t images, int64_t pixels, int64_t channels, const T* dz, const T* y, const T* scale,
                   const T* shift, const T* mean, double most, double* sum, double* product, int threads) {
    const int64_t groups = std::min<int64_t>(kGroups, images);
    std::vector<double> sums(groups * 2 * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t n = group * images / groups; n < (group + 1) * images / groups; ++n)
            for_channel_blocks<T>(channels, [&](int64_t channel, int valid) {
                const Activation<T> activation(most);
                const Affine<T> norm(scale, shift, channel, valid);
                const Pair<T> centre = Pair<T>::read(mean + channel, valid);
                Pair<T> total = Pair<T>::zero(), products = Pair<T>::zero();
                for (int64_t p = 0; p < pixels; ++p) {
                    const int64_t at = (n * pixels + p) * channels + channel;
                    const Pair<T> raw = Pair<T>::read(y + at, valid);
                    Pair<T> gradient = Pair<T>::read(dz + at, valid);
                    if (activation.given) gradient = activation.pass(gradient, norm(raw));
                    total = total + gradient;
                    products = products + gradient * (raw - centre);
                }
                add_to<T>(&sums[group * 2 * channels + channel], total, valid);
                add_to<T>(&sums[(group * 2 + 1) * channels + channel], products, valid);
            });
    std::fill(sum, sum + channels, 0.0);
    std::fill(product, product + channels, 0.0);
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t c = 0; c < channels; ++c) {
            sum[c] += sums[group * 2 * channels + c];
            product[c] += sums[(group * 2 + 1) * channels + c];
        }
}

// dy = a * dz + b * y + c with coefficients [3, C], dz let through by the activation where there is one. dy may be dz.
template <class T>
void apply_backward(int64_t rows, int64_t channels, const T* dz, const T* y, const T* scale, const T* shift,
                    double most, const T* coefficients, T* dy, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        for_channel_blocks<T>(channels, [&](int64_t channel, int valid) {
            const Activation<T> activation(most);
            const int64_t at = row * channels + channel;
            const Pair<T> raw = Pair<T>::read(y + at, valid);
            Pair<T> gradient = Pair<T>::read(dz + at, valid);
            if (activation.given)
                gradient = activation.pass(gradient, Affine<T>(scale, shift, channel, valid)(raw));
            const Pair<T> a = Pair<T>::read(coefficients + channel, valid);
            const Pair<T> b = Pair<T>::read(coefficients + channels + channel, valid);
            const Pair<T> c = Pair<T>::read(coefficients + 2 * channels + channel, valid);
            (a * gradient + b * raw + c).write(dy + at, valid);
        });
}

// From the two sums: the gradients of weight and bias, and the coefficients of `apply_backward`. Where the norm used
// its running statistics (count 0), these do not depend on y.
template <class T>
void finalize_backward(int64_t channels, double count, const double* sum, const double* product, const T* mean,
                       const T* rstd, const T* scale, T* d_weight, T* d_bias, T* coefficients) {
    for (int64_t c = 0; c < channels; ++c) {
        d_weight[c] = T(product[c] * rstd[c]);
        d_bias[c] = T(sum[c]);
        const double b = count == 0 ? 0 : -double(scale[c]) * rstd[c] * rstd[c] * product[c] / count;
        const double constant = count == 0 ? 0 : -double(scale[c]) * sum[c] / count - b * mean[c];
        coefficients[c] = scale[c];
        coefficients[channels + c] = T(b);
        coefficients[2 * channels + c] = T(constant);
    }
}

template <class Function>
bool for_kernel(int64_t kernel, int64_t stride, Function function) {
#define BSNAS_CASE(K, S) \
    if (kernel == K && stride == S) return function.template operator()<K, S>(), true;
    BSNAS_CASE(3, 1) BSNAS_CASE(3, 2) BSNAS_CASE(5, 1) BSNAS_CASE(5, 2) BSNAS_CASE(7, 1) BSNAS_CASE(7, 2)
#undef BSNAS_CASE
    return false;
}

}  // namespace

#define BSNAS_EXPORT(T, NAME)                                                                                          \
    extern "C" void depthwise_forward_##NAME(const int64_t* dims, int64_t kernel, double most, const T* x,             \
                                             const T* scale, const T* shift, const T* weight, T* y, double* mean, double* m2,\
                                             int threads) {                                                            \
        const Shape s{dims[0], dims[1], dims[2], dims[3], dims[4], most};                                              \
        for_kernel(kernel, s.stride, [&]<int K, int S>() {                                                             \
            depthwise_forward<T, K, S>(s, x, scale, shift, weight, y, mean, m2, threads);                              \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" void depthwise_backward_##NAME(                                                                         \
        const int64_t* dims, int64_t kernel, double most, const T* dz, const T* y, const T* y_scale, const T* y_shift, \
        const T* coefficients, const T* x, const T* x_scale, const T* x_shift, const T* x_mean, const T* weight,       \
        T* dx, T* d_weight, double* sum, double* product, int threads) {                                               \
        const Shape s{dims[0], dims[1], dims[2], dims[3], dims[4], most};                                              \
        const Backward<T> tensors{dz,     y,      y_scale, y_shift,  coefficients, x,      x_scale,                    \
                                  x_shift, x_mean, weight,  dx,       d_weight,     sum,    product};                  \
        for_kernel(kernel, s.stride, [&]<int K, int S>() { depthwise_backward<T, K, S>(s, tensors, threads); });       \
    }                                                                                                                  \
    extern "C" void image_moments_##NAME(int64_t images, int64_t pixels, int64_t channels, const T* y, double* mean,   \
                                         double* m2, int threads) {                                                    \
        image_moments<T>(images, pixels, channels, y, mean, m2, threads);                                              \
    }                                                                                                                  \
    extern "C" void finalize_##NAME(int64_t images, int64_t pixels, int64_t channels, const double* means,             \
                                    const double* m2s, const T* weight, const T* bias, T* running_mean,                \
                                    T* running_var, double momentum, double eps, T* mean, T* rstd, T* scale,           \
                                    T* shift) {                                                                        \
        finalize<T>(images, pixels, channels, means, m2s,                                                              \
                    Norm<T>{weight, bias, running_mean, running_var, momentum, eps, mean, rstd, scale, shift});        \
    }                                                                                                                  \
    extern "C" void apply_##NAME(int64_t rows, int64_t channels, const T* y, const T* scale, const T* shift,           \
                                 const T* shortcut, double most, T* z, int threads) {                                  \
        apply<T>(rows, channels, y, scale, shift, shortcut, most, z, threads);                                         \
    }                                                                                                                  \
    extern "C" void gradient_sums_##NAME(int64_t images, int64_t pixels, int64_t channels, const T* dz, const T* y,    \
                                         const T* scale, const T* shift, const T* mean, double most, double* sum,      \
                                         double* product, int threads) {                                               \
        gradient_sums<T>(images, pixels, channels, dz, y, scale, shift, mean, most, sum, product, threads);            \
    }                                                                                                                  \
    extern "C" void finalize_backward_##NAME(int64_t channels, double count, const double* sum, const double* product, \
                                             const T* mean, const T* rstd, const T* scale, T* d_weight, T* d_bias,     \
                                             T* coefficients) {                                                        \
        finalize_backward<T>(channels, count, sum, product, mean, rstd, scale, d_weight, d_bias, coefficients);        \
    }                                                                                                                  \
    extern "C" void apply_backward_##NAME(int64_t rows, int64_t channels, const T* dz, const T* y, const T* scale,     \
                                          const T* shift, double most, const T* coefficients, T* dy, int threads) {    \
        apply_backward<T>(rows, channels, dz, y, scale, shift, most, coefficients, dy, threads);                       \
    }

BSNAS_EXPORT(float, f32)
BSNAS_EXPORT(double, f64)
