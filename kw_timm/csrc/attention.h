/*
 * The attention of a KW layer, folded for inference, from the input to the coefficients of the mixtures.
 *
 *     hidden = relu(norm(mean(x) @ first + first_bias)),  logits = hidden @ second + second_bias
 *
 * A mixture's coefficients are its logits, or [hidden, 1] for bases, over (the sum of its logits' magnitudes + 1e-3).
 * As separate operations these small products take longer to start than to compute.
 */

typedef struct {
    const float *x, *first, *first_bias, *norm_weight, *norm_bias, *second, *second_bias;
    float *pooled, *hidden, *out;
    Py_ssize_t batch, channels, pixels, width, mixtures, logits; /* logits: cells + 1 */
    float epsilon;
    int bases;
} Attention;

CLONES
static float mean_of(const float *x, Py_ssize_t count)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Py_ssize_t i = 0; i < count; i++)
        sum += x[i];
    return sum / count;
}

CLONES
static void hide(const Attention *a, Py_ssize_t sample)
{
    const float *pooled = a->pooled + sample * a->channels;
    float *restrict hidden = a->hidden + sample * a->width;
    memcpy(hidden, a->first_bias, a->width * sizeof(float));
    for (Py_ssize_t c = 0; c < a->channels; c++) {
        const float *restrict row = a->first + c * a->width;
        for (Py_ssize_t h = 0; h < a->width; h++)
            hidden[h] += pooled[c] * row[h];
    }
    if (a->norm_weight) {
        const float mean = mean_of(hidden, a->width);
        float variance = 0;
        for (Py_ssize_t h = 0; h < a->width; h++)
            variance += (hidden[h] - mean) * (hidden[h] - mean);
        const float factor = 1 / sqrtf(variance / a->width + a->epsilon);
        for (Py_ssize_t h = 0; h < a->width; h++)
            hidden[h] = (hidden[h] - mean) * factor * a->norm_weight[h] + a->norm_bias[h];
    }
    for (Py_ssize_t h = 0; h < a->width; h++)
        hidden[h] = hidden[h] > 0 ? hidden[h] : 0;
}

/* The coefficients of one mixture of one sample; `logits` has room for them. */
CLONES
static void attend_one(const Attention *a, Py_ssize_t sample, Py_ssize_t mixture, float *restrict logits)
{
    const Py_ssize_t n = a->logits, terms = a->bases ? a->width + 1 : n - 1;
    const float *hidden = a->hidden + sample * a->width;
    float *restrict out = a->out + (sample * a->mixtures + mixture) * terms;
    memcpy(logits, a->second_bias + mixture * n, n * sizeof(float));
    for (Py_ssize_t h = 0; h < a->width; h++) {
        const float *restrict row = a->second + h * a->mixtures * n + mixture * n;
        if (hidden[h] != 0)
            for (Py_ssize_t j = 0; j < n; j++)
                logits[j] += hidden[h] * row[j];
    }
    float norm = 0;
#pragma omp simd reduction(+ : norm)
    for (Py_ssize_t j = 0; j < n; j++)
        norm += logits[j] < 0 ? -logits[j] : logits[j];
    const float scale = 1 / (norm + 1e-3f);
    const float *from = a->bases ? hidden : logits;
    for (Py_ssize_t j = 0; j < terms; j++)
        out[j] = (a->bases && j == a->width ? 1 : from[j]) * scale;
}

static int attend_all(const Attention *a)
{
    const Py_ssize_t rows = a->batch * a->channels, tasks = a->batch * a->mixtures;
    int failed = 0;
    (void)rows, (void)tasks;
#pragma omp parallel for schedule(static) if (rows * a->pixels > 50000)
    for (Py_ssize_t row = 0; row < rows; row++)
        a->pooled[row] = mean_of(a->x + row * a->pixels, a->pixels);
#pragma omp parallel for schedule(static) if (rows * a->width > 200000)
    for (Py_ssize_t sample = 0; sample < a->batch; sample++)
        hide(a, sample);
#pragma omp parallel if (tasks * a->width * a->logits > 100000)
    {
        float *logits = malloc(a->logits * sizeof(float));
#pragma omp for schedule(static)
        for (Py_ssize_t task = 0; task < tasks; task++)
            if (logits)
                attend_one(a, task % a->batch, task / a->batch, logits);
            else
                failed = 1;
        free(logits);
    }
    return failed;
}

static PyObject *attend(PyObject *module, PyObject *args)
{
    Attention a;
    Py_ssize_t x, first, first_bias, norm_weight, norm_bias, second, second_bias, work, out;
    (void)module;
    if (!PyArg_ParseTuple(args, "nnnnnnnnnnnnnnnfi", &x, &first, &first_bias, &norm_weight, &norm_bias, &second,
                          &second_bias, &work, &out, &a.batch, &a.channels, &a.pixels, &a.width, &a.mixtures,
                          &a.logits, &a.epsilon, &a.bases))
        return NULL;
    a.x = (const float *)x;
    a.first = (const float *)first;
    a.first_bias = (const float *)first_bias;
    a.norm_weight = (const float *)norm_weight;
    a.norm_bias = (const float *)norm_bias;
    a.second = (const float *)second;
    a.second_bias = (const float *)second_bias;
    a.pooled = (float *)work;
    a.hidden = a.pooled + a.batch * a.channels;
    a.out = (float *)out;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = attend_all(&a);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}
