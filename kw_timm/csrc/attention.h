/*
 * The attention of a KW layer, folded for inference, from the input to the coefficients of the mixtures.
 *
 *     hidden = relu(norm(mean(x) @ first + first_bias)),  logits = hidden @ second + second_bias
 *
 * A mixture's coefficients are its logits, or [hidden, 1] for bases, over (the sum of its logits' magnitudes + 1e-3).
 * As separate operations these small products take longer to start than to compute. Compiled for each instruction set.
 */
#pragma once
#include "tasks.h"

namespace kw_timm {

template <typename Set> struct AttentionSteps {
    static float mean(const float *x, ptrdiff_t count)
    {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (ptrdiff_t i = 0; i < count; i++)
            sum += x[i];
        return sum / count;
    }

    /* sums += factors @ rows. Four rows at a time: memory takes longer than arithmetic. */
    static void add_rows(float *__restrict sums, ptrdiff_t width, const float *__restrict factors, ptrdiff_t count,
                         const float *__restrict rows, ptrdiff_t stride)
    {
        ptrdiff_t r = 0;
        for (; r + 4 <= count; r += 4, rows += 4 * stride) {
            const float a = factors[r], b = factors[r + 1], c = factors[r + 2], d = factors[r + 3];
            for (ptrdiff_t i = 0; i < width; i++)
                sums[i] += a * rows[i] + b * rows[stride + i] + c * rows[2 * stride + i] + d * rows[3 * stride + i];
        }
        for (; r < count; r++, rows += stride)
            for (ptrdiff_t i = 0; i < width; i++)
                sums[i] += factors[r] * rows[i];
    }

    static void hide(const Attention &a, ptrdiff_t sample)
    {
        const float *pooled = a.pooled + sample * a.channels;
        float *__restrict hidden = a.hidden + sample * a.width;
        memcpy(hidden, a.first_bias, a.width * sizeof(float));
        add_rows(hidden, a.width, pooled, a.channels, a.first, a.width);
        if (a.norm_weight) {
            const float average = mean(hidden, a.width);
            float variance = 0;
            for (ptrdiff_t h = 0; h < a.width; h++)
                variance += (hidden[h] - average) * (hidden[h] - average);
            const float factor = 1 / sqrtf(variance / a.width + a.epsilon);
            for (ptrdiff_t h = 0; h < a.width; h++)
                hidden[h] = (hidden[h] - average) * factor * a.norm_weight[h] + a.norm_bias[h];
        }
        for (ptrdiff_t h = 0; h < a.width; h++)
            hidden[h] = hidden[h] > 0 ? hidden[h] : 0;
    }

    /* The coefficients of one mixture of one sample; `logits` has room for them. */
    static void attend(const Attention &a, ptrdiff_t sample, ptrdiff_t mixture, float *__restrict logits)
    {
        const ptrdiff_t n = a.logits, terms = a.bases ? a.width + 1 : n - 1;
        const float *hidden = a.hidden + sample * a.width;
        float *__restrict out = a.out + (sample * a.mixtures + mixture) * terms;
        memcpy(logits, a.second_bias + mixture * n, n * sizeof(float));
        add_rows(logits, n, hidden, a.width, a.second + mixture * n, a.mixtures * n);
        float norm = 0;
#pragma omp simd reduction(+ : norm)
        for (ptrdiff_t j = 0; j < n; j++)
            norm += logits[j] < 0 ? -logits[j] : logits[j];
        const float scale = 1 / (norm + 1e-3f);
        const float *from = a.bases ? hidden : logits;
        for (ptrdiff_t j = 0; j < terms; j++)
            out[j] = (a.bases && j == a.width ? 1 : from[j]) * scale;
    }
};

}
