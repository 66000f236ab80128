"""Product of a few tokens with an int8 matrix, as a GPU kernel (Pallas, Triton backend).

The kernel reads int8 from memory and converts to bfloat16 for the matrix units. The chip's own conversion
instruction costs more time than reading int8 saves, so the kernel assembles the bfloat16 bits itself.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Array = jax.Array

MOST_TOKENS = 64  # above this, arithmetic and not the read bounds the product
COLUMNS = 128
DEPTH = 128
PROGRAMS = 256  # about twice the number of multiprocessors on the chip
WARPS, STAGES = 4, 4

# Converts four int8 in one register to four bfloat16 in two registers. Each int8 is widened to 16 bits. Its
# low seven bits go into the mantissa of 128, which gives 128 + low. Its sign bit goes into the mantissa of
# -128, which gives -128 or -256. The sum of the two is the number, exactly.
_WIDEN = """
{
.reg .b32 pair, low, sign, one;
mov.b32 one, 0x3F803F80;
prmt.b32 pair, $2, 0, 0x4140;
lop3.b32 low, pair, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, pair, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $0, low, one, sign;
prmt.b32 pair, $2, 0, 0x4342;
lop3.b32 low, pair, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, pair, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $1, low, one, sign;
}
"""


def fits(x: Array, matrix: Array) -> bool:
    """Whether the kernel handles x [N, D] and matrix [F, D]."""
    return x.dtype == jnp.bfloat16 and x.shape[0] <= MOST_TOKENS and matrix.shape[1] % DEPTH == 0


def product(x: Array, matrix: Array, *, interpret: bool) -> Array:
    """x bfloat16 [N, D] times the transposed matrix int8 [F, D]: float32 [N, F].

    The contracted axis is the last one of the matrix, so the four int8 that a thread loads into one register
    are neighbours in memory.
    """
    (N, D), F = x.shape, matrix.shape[0]
    # Splits the sum over D among programs until there are enough of them to keep the memory busy.
    parts = 1
    columns = pl.cdiv(F, COLUMNS)
    while parts * columns < PROGRAMS and D % (2 * parts * DEPTH) == 0:
        parts *= 2
    sums = pl.pallas_call(
        functools.partial(_kernel, depth=D // parts, interpret=interpret),
        grid=(columns, parts),
        out_shape=jax.ShapeDtypeStruct((parts, N, F), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="int8_product",
    )(x, matrix)
    return jnp.sum(sums, axis=0)


def _kernel(x, matrix, out, *, depth: int, interpret: bool):
    column, part = pl.program_id(0), pl.program_id(1)
    # Indices past the last row or column repeat it and rewrite the same numbers. The matrix units take no
    # fewer than 16 rows.
    rows = jnp.minimum(jnp.arange(max(16, pl.next_power_of_2(x.shape[0]))), x.shape[0] - 1)
    columns = jnp.minimum(column * COLUMNS + jnp.arange(COLUMNS), matrix.shape[0] - 1)

    def add(i, total):
        at = pl.ds(part * depth + i * DEPTH, DEPTH)
        return total + plgpu.dot(x[rows, at], _widened(matrix[columns, at], interpret).T)

    total = jnp.zeros((rows.size, COLUMNS))
    out[part, rows[:, None], columns[None]] = jax.lax.fori_loop(0, depth // DEPTH, add, total)


def _widened(x: Array, interpret: bool) -> Array:
    """int8 as bfloat16."""
    if interpret:
        return x.astype(jnp.bfloat16)
    shape = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    (y,) = plgpu.elementwise_inline_asm(
        _WIDEN, args=[x], constraints="=r,=r,r", pack=4, result_shape_dtypes=[shape]
    )
    return y
