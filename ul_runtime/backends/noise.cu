// Standard normal noise made on a card: the very bytes of ul_runtime/noise.py, which says what is computed and why.
// Every operation is exactly rounded (-fmad=false), so no card changes a bit.
// tools/compile_noise makes noise.ptx of this file, which is what drivers take.

typedef unsigned int word;
typedef unsigned long long wide;

// Philox4x32-10 of the counter (block, stream, index low, index high): one thread, four values.
// Grid: images x blocks of an image / blockDim.x; `out` [images, size], `index` [images], `table` [4, 1024].
extern "C" __global__ void normals(float* out, const double* table, const wide* index, word key_0, word key_1, word stream, word size)
{
    word block = blockIdx.y * blockDim.x + threadIdx.x;
    word first = 4 * block;
    if (first >= size) return;
    wide image = index[blockIdx.x];
    word even_0 = block, odd_0 = stream, even_1 = (word)image, odd_1 = (word)(image >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        word high_0 = __umulhi(even_0, 0xD2511F53u), low_0 = even_0 * 0xD2511F53u;
        word high_1 = __umulhi(even_1, 0xCD9E8D57u), low_1 = even_1 * 0xCD9E8D57u;
        even_0 = high_1 ^ odd_0 ^ key_0, even_1 = high_0 ^ odd_1 ^ key_1;
        odd_0 = low_1, odd_1 = low_0;
        key_0 += 0x9E3779B9u, key_1 += 0xBB67AE85u;
    }
    word words[4] = {even_0, odd_0, even_1, odd_1};
    float* at = out + (wide)blockIdx.x * size + first;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        double centred = (double)words[k] - 2147483647.5;
        double magnitude = 2147483648.0 - fabs(centred);  // 2^32 u of the smaller tail
        wide bits = (wide)__double_as_longlong(magnitude);
        const double* segment = table + ((bits >> 47) - (1022 << 5));
        double offset = __longlong_as_double((long long)((bits & 0x7FFFFFFFFFFFull) | 0x3FF0000000000000ull)) - 1.015625;
        double value = segment[3 * 1024];
        value = value * offset + segment[2 * 1024];
        value = value * offset + segment[1024];
        value = value * offset + segment[0];
        if (first + k < size) at[k] = (float)(value * centred);
    }
}
