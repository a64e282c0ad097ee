"""Triton kernels over lists of tensors, one launch for a whole list. `fused.py` calls them.

A list is a table of addresses. Its tensors are cut into blocks of `BLOCK` elements, the last of each being shorter; one
program takes one block, whose tensor (`owners`) and first element (`starts`) stand in two more tables.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096
# Products and sums fused as in torch's own kernels. To be said: Triton's default changes, of which it warns.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}
# block sums that are added at a time
WIDTH = 4096
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def squares(addresses, sizes, owners, starts, sums, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of each block's squares, in float64."""
    owner, size, offsets, whole = _block(sizes, owners, starts, BLOCK)
    here = _memory(addresses, owner, TYPE, ALIGNED) + offsets
    x = tl.load(here) if whole else tl.load(here, mask=offsets < size, other=0.0)
    tl.store(sums + tl.program_id(0), _sum_of_squares(x))


@triton.jit(do_not_specialize=["count"])
def root(sums, norm, count, WIDTH: tl.constexpr):
    """The square root of the sum of `sums`. One program: the order of addition is always the same."""
    total = tl.zeros((WIDTH,), tl.float64)
    for start in range(0, count, WIDTH):
        offsets = start + tl.arange(0, WIDTH)
        total += tl.load(sums + offsets, mask=offsets < count, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(total)))


@triton.jit
def backup_and_perturb(
    thetas,
    copies,
    grads,
    sizes,
    owners,
    starts,
    norm,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """copy <- theta, theta <- theta + eps / norm * g, in arithmetic of type `WIDE`. `eps` and `norm` are 0-dim."""
    # Every program divides for itself, which hides behind its memory traffic and saves a launch.
    scale = (tl.load(eps).to(tl.float64) / tl.load(norm).to(tl.float64)).to(WIDE)
    moves = (scale > 0) & (scale.to(tl.float32) < float("inf"))
    owner, size, offsets, whole = _block(sizes, owners, starts, BLOCK)
    theta = _memory(thetas, owner, PARAM, ALIGNED) + offsets
    copy = _memory(copies, owner, PARAM, ALIGNED) + offsets
    g1 = _memory(grads, owner, GRAD, ALIGNED) + offsets
    if whole:
        _perturb_block(theta, copy, g1, scale, moves, None)
    else:
        _perturb_block(theta, copy, g1, scale, moves, offsets < size)


@triton.jit
def copy(targets, sources, sizes, owners, starts, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """target <- source, bit for bit."""
    owner, size, offsets, whole = _block(sizes, owners, starts, BLOCK)
    target = _memory(targets, owner, TYPE, ALIGNED) + offsets
    source = _memory(sources, owner, TYPE, ALIGNED) + offsets
    if whole:
        tl.store(target, tl.load(source))
    else:
        tl.store(target, tl.load(source, mask=offsets < size), mask=offsets < size)


@triton.jit
def _block(sizes, owners, starts, BLOCK: tl.constexpr):
    """This program's tensor, that one's size, the block's offsets in it, and whether all of them are inside."""
    owner = tl.load(owners + tl.program_id(0))
    start = tl.multiple_of(tl.load(starts + tl.program_id(0)), BLOCK)
    size = tl.load(sizes + owner)
    return owner, size, start + tl.arange(0, BLOCK), start + BLOCK <= size


@triton.jit
def _memory(addresses, owner, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tensor begins. Only if that is known to be a multiple of 16 bytes are 16 loaded at a time."""
    pointer = tl.load(addresses + owner).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _sum_of_squares(x):
    """In float64. There are GPUs on which float64 is 64 times slower, so for narrower types only the result is.

    Such a block is first divided by the power of two below its largest element, which rounds nothing that counts: then
    no square overflows, and those that underflow are too small beside the largest to matter. inf and NaN stay.
    """
    if x.dtype == tl.float64:
        total = tl.sum(x * x)
    else:
        x = x.to(tl.float32)
        # the exponent's field of a float32; at its ends the two powers of two would not be normal numbers
        exponent = tl.max(tl.abs(x)).to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        x *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        unit = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
        total = tl.sum(x * x).to(tl.float64) * unit * unit
    return total


@triton.jit
def _perturb_block(theta, copy, g1, scale, moves, inside):
    before = tl.load(theta, mask=inside)
    along = tl.load(g1, mask=inside)
    after = before.to(scale.dtype) + scale * along.to(scale.dtype)
    tl.store(copy, before, mask=inside)
    # `where`, not scale = 0: a gradient with inf or NaN in it times zero is still NaN
    tl.store(theta, tl.where(moves, after.to(before.dtype), before), mask=inside)
