"""Triton kernels that the tests compile: small ones that between them use what real ones use."""

import triton
import triton.language as tl


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, M, N, K, BLOCK: tl.constexpr, BK: tl.constexpr, P: tl.constexpr):
    """c = a b, one [BLOCK, BLOCK] tile per program, masked on all sides."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        m_a = (rows < M)[:, None] & (k < K)[None, :]
        m_b = (k < K)[:, None] & (columns < N)[None, :]
        a = tl.load(a_ptr + rows[:, None] * K + k[None, :], mask=m_a, other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + columns[None, :], mask=m_b, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=P)
    m_c = (rows < M)[:, None] & (columns < N)[None, :]
    p_c = c_ptr + rows[:, None] * N + columns[None, :]
    tl.store(p_c, acc.to(c_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, o_ptr, T, scale, D: tl.constexpr, C: tl.constexpr):
    """o = causal softmax(q k^T) v with a running maximum, [C, D] queries per program."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64) * T * D
    d = tl.arange(0, D)
    i = block * C + tl.arange(0, C)
    q = tl.load(q_ptr + head + i[:, None] * D + d[None, :], mask=(i < T)[:, None], other=0.0)
    top = tl.full((C,), float("-inf"), tl.float32)
    den = tl.zeros((C,), tl.float32)
    acc = tl.zeros((C, D), tl.float32)
    for start in range(0, (block + 1) * C, C):
        j = start + tl.arange(0, C)
        o_kv = head + j[:, None] * D + d[None, :]
        k = tl.load(k_ptr + o_kv, mask=(j < T)[:, None], other=0.0)
        v = tl.load(v_ptr + o_kv, mask=(j < T)[:, None], other=0.0)
        z = tl.dot(q, tl.trans(k)) * scale
        z = tl.where((i[:, None] >= j[None, :]) & (j < T)[None, :], z, float("-inf"))
        new = tl.maximum(top, tl.max(z, 1))
        p = tl.exp2(z - new[:, None])
        shrink = tl.exp2(top - new)
        den = den * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new
    o = acc / den[:, None]
    p_o = o_ptr + head + i[:, None] * D + d[None, :]
    tl.store(p_o, o.to(o_ptr.dtype.element_ty), mask=(i < T)[:, None])


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offset, tl.load(x_ptr + offset, mask=offset < n), mask=offset < n)


@triton.jit
def copy_column(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    """y = x[:, 0], whose elements are `stride` apart."""
    row = tl.arange(0, BLOCK)
    tl.store(y_ptr + row, tl.load(x_ptr + row * stride))


@triton.jit
def store_everywhere(y_ptr, BLOCK: tl.constexpr):
    """Every program stores the same bytes."""
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.full((BLOCK,), 1.0, tl.float32))


@triton.jit
def features(x_ptr, flags_ptr, index_ptr, y_ptr, where_ptr, n, twice, N: tl.constexpr):
    """What kernels do besides dots: types, scans, sorts of layouts, scalar ifs, unrolled loops."""
    o = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    m = o < n
    x = tl.load(x_ptr + o, mask=m, other=0.0)
    flag = tl.load(flags_ptr + o, mask=m, other=0)
    index = tl.load(index_ptr + o, mask=m, other=0)
    if twice > 0:
        x = x * 2
    for step in tl.static_range(2):
        x = tl.where(flag != 0, x, tl.log(tl.abs(x) + 1 + step) + tl.sqrt(tl.abs(x)))
    x = x + (index % 7).to(tl.float32) - (index // 3).to(tl.float32)
    square = tl.trans(tl.reshape(x, (N // 8, 8)))  # [8, N / 8]
    square = square + tl.sum(square, 0)[None, :] * tl.max(square, 1)[:, None]
    flat = tl.reshape(tl.trans(square), (N,))
    tl.store(y_ptr + o, tl.cumsum(flat, 0), mask=m)
    tl.store(where_ptr + tl.program_id(0), tl.argmax(x, 0).to(tl.int64))
    tl.store(flags_ptr + o, (x > 0).to(tl.int8), mask=m)


@triton.jit
def atomics(x_ptr, sum_ptr, lock_ptr, count_ptr, N: tl.constexpr):
    """sum += x, and a counter that is protected by a lock."""
    i = tl.arange(0, N)
    tl.atomic_add(sum_ptr + i % 4, tl.load(x_ptr + tl.program_id(0) * N + i))
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(count_ptr, tl.load(count_ptr) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)
