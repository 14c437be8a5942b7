"""Small kernels that the tools are tested with; some are wrong on purpose, and say so."""

import triton
import triton.language as tl


@triton.jit
def binary(p_x, p_y, p_o, OP: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(p_x + o_n)
    b_y = tl.load(p_y + o_n)
    if OP == "add":
        b_o = b_x + b_y
    elif OP == "sub":
        b_o = b_x - b_y
    elif OP == "mul":
        b_o = b_x * b_y
    elif OP == "div":
        b_o = (b_x / b_y).to(b_x.dtype)
    elif OP == "max":
        b_o = tl.maximum(b_x, b_y)
    elif OP == "min":
        b_o = tl.minimum(b_x, b_y)
    elif OP == "lt":
        b_o = b_x < b_y
    elif OP == "eq":
        b_o = b_x == b_y
    elif OP == "where":
        b_o = tl.where(b_x > b_y, b_x, -b_y)
    elif OP == "fma":
        b_o = tl.fma(b_x, b_y, b_x)
    elif OP == "abs":
        b_o = tl.abs(b_x)
    elif OP == "clamp":
        b_o = tl.clamp(b_x, -0.5, 0.5)
    elif OP == "clamp with nan":
        b_o = tl.clamp(b_x, -0.5, 0.5, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "atomic":
        b_o = tl.atomic_add(p_y + o_n, b_x)
    tl.store(p_o + o_n, b_o)


@triton.jit
def cast(p_x, p_o, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_o + o_n, tl.load(p_x + o_n).to(p_o.dtype.element_ty))


@triton.jit
def scaled(p_x, p_o, scale, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_o + o_n, tl.load(p_x + o_n) * scale)


@triton.jit
def _second(x_a, x_b, y_a, y_b):
    return y_a, y_b


@triton.jit
def _recurrence(decay_a, value_a, decay_b, value_b):
    return decay_a * decay_b, value_a * decay_b + value_b


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def reduction(p_x, p_o, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    o_m = tl.arange(0, M)
    b_x = tl.load(p_x + o_m[:, None] * N + tl.arange(0, N)[None, :])
    if OP == "sum":
        b_o = tl.sum(b_x, 1)
    elif OP == "max":
        b_o = tl.max(b_x, 1)
    elif OP == "min":
        b_o = tl.min(b_x, 1)
    elif OP == "argmax":
        b_o = tl.argmax(b_x, 1)
    elif OP == "argmin":
        b_o = tl.argmin(b_x, 1)
    elif OP == "product":
        b_o = tl.reshape(tl.reduce(b_x, 1, _product, keep_dims=True), (M,))
    elif OP == "product of all":
        b_o = tl.zeros((M,), b_x.dtype) + tl.reduce(b_x, None, _product)
    elif OP == "last":
        _, b_o = tl.reduce((b_x, b_x), 1, _second)
    tl.store(p_o + o_m, b_o)


@triton.jit
def scan(p_x, p_y, p_o, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    o_mn = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(p_x + o_mn)
    if OP == "cumsum":
        b_o = tl.cumsum(b_x, 1)
    elif OP == "reversed":
        b_o = tl.cumsum(b_x, 1, reverse=True)
    elif OP == "recurrence":
        _, b_o = tl.associative_scan((tl.load(p_y + o_mn), b_x), 1, _recurrence)
    tl.store(p_o + o_mn, b_o)


@triton.jit
def product(p_a, p_b, p_o, PRECISION: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    o_nn = o_n[:, None] * N + o_n[None, :]
    b_o = tl.dot(tl.load(p_a + o_nn), tl.load(p_b + o_nn), input_precision=PRECISION)
    tl.store(p_o + o_nn, b_o)


@triton.jit
def tail(p_x, p_o, T, OFF_BY: tl.constexpr, N: tl.constexpr):
    """A copy whose mask lets OFF_BY elements too many pass."""
    o_t = tl.program_id(0) * N + tl.arange(0, N)
    m_t = o_t < T + OFF_BY
    tl.store(p_o + o_t, tl.load(p_x + o_t, mask=m_t), mask=m_t)


@triton.jit
def masked_sum(p_x, p_o, T, OTHER: tl.constexpr, N: tl.constexpr):
    """Without OTHER, the masked lanes are undefined, and so is the sum."""
    o_n = tl.arange(0, N)
    b_x = tl.load(p_x + o_n, mask=o_n < T, other=OTHER)
    tl.store(p_o, tl.sum(b_x, 0))


@triton.jit
def into_neighbour(p_x, p_o, offset, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_o + o_n, tl.load(p_x + offset + o_n))


@triton.jit
def rows(p_x, p_o, MASKED: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Copies R elements per program in blocks of N; without a mask, stores into the next one's."""
    o_n = tl.arange(0, N)
    o_r = tl.program_id(0) * R + o_n
    if MASKED:
        tl.store(p_o + o_r, tl.load(p_x + o_r, mask=o_n < R), mask=o_n < R)
    else:
        tl.store(p_o + o_r, tl.load(p_x + o_r))


@triton.jit
def last_to_arrive(p_x, p_part, p_count, p_o, n, SEM: tl.constexpr, N: tl.constexpr):
    """Sums rows: each program leaves its part, the last one to count itself adds them up."""
    i_n = tl.program_id(0)
    o_n = tl.arange(0, N)
    tl.store(p_part + i_n * N + o_n, tl.load(p_x + i_n * N + o_n) * 2)
    if tl.atomic_add(p_count, 1, sem=SEM) == n - 1:
        b_o = tl.zeros((N,), tl.float32)
        for i in range(n):
            b_o += tl.load(p_part + i * N + o_n)
        tl.store(p_o + o_n, b_o)
        tl.store(p_count, 0)  # for the next launch


@triton.jit
def late_store(p_part, p_count, p_o, n, N: tl.constexpr):
    """Wrong: the part is stored after the program has counted itself."""
    i_n = tl.program_id(0)
    o_n = tl.arange(0, N)
    last = tl.atomic_add(p_count, 1) == n - 1
    tl.store(p_part + i_n * N + o_n, tl.zeros((N,), tl.float32))
    if last:
        tl.store(p_o + o_n, tl.load(p_part + o_n))


@triton.jit
def read_then_overwrite(p_x, p_count, p_o, n, ORDERED: tl.constexpr, N: tl.constexpr):
    """All programs read x, the last one overwrites it."""
    o_n = tl.arange(0, N)
    b_x = tl.load(p_x + o_n)
    tl.store(p_o + tl.program_id(0) * N + o_n, b_x)
    i_arrival = tl.atomic_add(p_count, 1) if ORDERED else tl.program_id(0)
    if i_arrival == n - 1:
        tl.store(p_x + o_n, b_x + 1)


@triton.jit
def zero_and_count(p_count):
    """Wrong: program 0 clears what the others count on."""
    if tl.program_id(0) == 0:
        tl.store(p_count, 0)
    else:
        tl.atomic_add(p_count, 1)


@triton.jit
def count_and_look(p_count, p_o):
    """Wrong: the last program looks at the counter while others count."""
    i = tl.program_id(0)
    if i < tl.num_programs(0) - 1:
        tl.atomic_add(p_count, 1)
    else:
        tl.store(p_o, tl.load(p_count))


@triton.jit
def relay(p_o):
    """Wrong: each program needs the one before it to have run."""
    i = tl.program_id(0)
    tl.store(p_o + i, tl.load(p_o + i - 1, mask=i > 0, other=0.0) + 1)


@triton.jit
def row_sum(p_x, p_o, T, ACC: tl.constexpr, N: tl.constexpr):
    """The sum of T numbers, with an accumulator of dtype ACC."""
    o_n = tl.arange(0, N)
    b_acc = tl.zeros((N,), ACC)
    for t in range(0, T, N):
        b_acc = (b_acc + tl.load(p_x + t + o_n)).to(ACC)
    tl.store(p_o, tl.sum(b_acc.to(tl.float32)))


@triton.jit
def wraps(p_x, p_o, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_o + o_n, tl.load(p_x + o_n) * 65536)


@triton.jit
def asserts(p_x, N: tl.constexpr):
    tl.device_assert(tl.load(p_x + tl.arange(0, N)) > 0, "x is positive")


@triton.jit
def optional(p_x, p_bias, p_o, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_o = tl.load(p_x + o_n)
    if p_bias is not None:
        b_o += tl.load(p_bias + o_n)
    tl.store(p_o + o_n, b_o)


@triton.jit
def matmul(p_a, p_b, p_o, K, BT: tl.constexpr, BK: tl.constexpr):
    """One [BT, K] x [K, BT] tile; the loop shows pipelining and tensor cores."""
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    b_o = tl.zeros((BT, BT), tl.float32)
    for k in range(0, K, BK):
        b_a = tl.load(p_a + o_t[:, None] * K + (k + o_k)[None, :])
        b_b = tl.load(p_b + (k + o_k)[:, None] * BT + o_t[None, :])
        b_o = tl.dot(b_a, b_b, acc=b_o)
    tl.store(p_o + o_t[:, None] * BT + o_t[None, :], b_o.to(p_o.dtype.element_ty))


@triton.jit
def many_live_values(p_x, p_o, T, N: tl.constexpr):
    """Needs more registers than there are: 64 x 64 fp32 products of 4 kinds live in one warp."""
    o_nn = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_0 = tl.zeros((N, N), tl.float32)
    b_1 = tl.zeros((N, N), tl.float32)
    b_2 = tl.zeros((N, N), tl.float32)
    b_3 = tl.zeros((N, N), tl.float32)
    for t in range(T):
        b_x = tl.load(p_x + t * N * N + o_nn)
        b_0 += b_x
        b_1 = b_1 * b_x + b_0
        b_2 = b_2 * b_x + b_1
        b_3 = b_3 * b_x + b_2
    tl.store(p_o + o_nn, b_0 + b_1 + b_2 + b_3)


@triton.jit
def uncompilable(p_x, N: tl.constexpr):
    tl.static_assert(N > 16, "N is too small")
    tl.store(p_x + tl.arange(0, N), 0.0)


@triton.jit
def convert(x_ptr, o_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o_ptr + i, tl.load(x_ptr + i).to(o_ptr.dtype.element_ty))


@triton.jit
def convert_toward_zero(x_ptr, o_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(o_ptr + i, x.to(o_ptr.dtype.element_ty, fp_downcast_rounding="rtz"))


@triton.jit
def fma(x_ptr, y_ptr, z_ptr, o_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    tl.store(o_ptr + i, tl.fma(x, y, z))
