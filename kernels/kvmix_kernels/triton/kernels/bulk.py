"""Tokens packed in both tensors: codes go to the tensor cores as they lie (see `fields.field`).

Scales of keys multiply the query (once per group of tokens) or, if they are those of tokens, what the channels of
each add to scores; scales of values multiply the probabilities. Offsets become one number per group and per token.
Everything is normalized, so half precision can not overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.triton.kernels.fields import (
    ORDERED,
    ROTATED,
    TILED,
    as_offset,
    digit_above,
    digit_bits,
    digit_channels,
    digit_count,
    digit_factor,
    digit_plane,
    digit_sums,
    field,
    field_end,
    field_factor,
    field_first,
    field_sum,
    fold,
    fold_channels,
    fold_copies,
    fold_fields,
    fold_width,
    four_steps,
    is_cut,
    merged_field,
    merges,
    middle,
    narrow_step,
    next_power_of_2,
    plane_words,
    shifts_first,
    stored,
    summed_digits,
    top_digit,
    word_at,
    words_per_token,
)
from kvmix_kernels.triton.kernels.masks import (
    LN2,
    LOWEST,
    MAX_LOOK,
    capped,
    exp,
    reach,
    rounded_product,
    under_mask,
)

TINY = tl.constexpr(1e-30)

TURNS = tl.constexpr(triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")))
"""Versions that were seen to lay out what `_turned` exchanges as it asks for; others exchange by themselves."""

BY_FOURS = tl.constexpr(triton.__version__.startswith("3.6."))
"""Versions in which a join of bytes makes a thread have four tokens in a row of every operand of a product."""

PEAK = tl.constexpr(16384.0)
"""Largest half-precision operand after normalization."""

READ_AHEAD = tl.constexpr(32 * 128)
"""Scales, and as many offsets, that a warp reads at once before the main loop."""

FEW_GROUPS = tl.constexpr(16)
"""Groups of a share up to which its offsets are multiplied field by field."""

SLACK = tl.constexpr(256.0)
"""How much larger than some scales of a share all others are taken to be; operands overflow at 4 times as much."""


@triton.jit
def _paged(x, buffers, strides, pages, page, ok):
    """`x` where it lies in some page of the share, or in each of several."""
    block = tl.load(pages.table + page, mask=ok, other=0).to(tl.int64)
    return stored(buffers, strides, block, pages.head, x.tile)


@triton.jit
def _by_fours(token):
    """The tokens that a thread of a product has, two and two of sixteen, as four in a row: 0, 1, 8, 9, 2, 3, ..."""
    return (token & -15) | ((token & 2) << 2) | ((token & 12) >> 1)


@triton.jit
def _rows_by_fours(x):
    """The rows of [TOKENS, N] in the order of `_by_fours`."""
    TOKENS: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.reshape(x, [TOKENS // 16, 2, 4, 2, N])
    return tl.reshape(tl.permute(x, [0, 2, 1, 3, 4]), [TOKENS, N])


@triton.jit
def _load_plane(
    base_ptr, first, column,
    X: tl.constexpr, DIGIT: tl.constexpr, PLANE: tl.constexpr, ALIGN: tl.constexpr, TOKENS: tl.constexpr,
    RANGE: tl.constexpr, FOURS: tl.constexpr,
):  # fmt: skip
    """Words of a digit's plane in TOKENS rows from `first` on, a multiple of ALIGN, and at indices `column`, that of
    tokens or of channels alone: folded copies side by side but not yet shifted.

    RANGE: a number that no other plane of a step has. Where planes share an index of tokens, the compiler keeps its
    multiples in registers and adds them up for every copy, instead of writing constants into instructions.
    """
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    D: tl.constexpr = digit_channels(X.KEPT, X.HIGH, DIGIT)
    AT: tl.constexpr = digit_plane(X.BITS, DIGIT) + PLANE
    WORDS: tl.constexpr = plane_words(OWN, D, PLANE)
    COPIES: tl.constexpr = fold_copies(OWN, D, PLANE)
    # copies are made in registers: threads that share a word read it at once
    ONCE: tl.constexpr = (
        COPIES > 1
        and column.shape[0] == 1
        and WORDS & (WORDS - 1) == 0
        and fold_width(OWN, D) == WORDS * COPIES
    )
    word = column
    if ONCE:
        word = tl.arange(0, WORDS)[None, :]
    elif COPIES > 1:
        # two threads of a copy that read the same 16 bytes are slow; pieces of 8 go through L1, which serves both
        PIECE: tl.constexpr = min(4, WORDS & -WORDS)
        if column.shape[0] == 1:
            word = tl.max_contiguous(column % WORDS, [1, PIECE])
        else:
            word = tl.max_contiguous(column % WORDS, [PIECE, 1])
    AHEAD: tl.constexpr = RANGE * TOKENS
    token = tl.arange(AHEAD, AHEAD + TOKENS)
    if FOURS:
        token = _by_fours(token)
    token = tl.expand_dims(token, 1 if column.shape[0] == 1 else 0)
    first -= AHEAD
    if ALIGN % X.BLOCK == 0:
        # places from the first are the same in every step
        base_ptr += first * words_per_token(X.BITS, X.KEPT, X.HIGH)
        at = word_at(token, X.BITS, X.KEPT, X.HIGH, AT, X.BLOCK) + word
    else:
        at = word_at(first + token, X.BITS, X.KEPT, X.HIGH, AT, X.BLOCK) + word
    if ONCE:
        own = tl.expand_dims(tl.load(base_ptr + at), 1)
        words = tl.reshape(tl.broadcast_to(own, [TOKENS, COPIES, WORDS]), [TOKENS, COPIES * WORDS])
    elif fold_width(OWN, D) == WORDS * COPIES:
        words = tl.load(base_ptr + at)
    else:
        words = tl.load(base_ptr + at, mask=(token >= 0) & (column < WORDS * COPIES), other=0)
    return words


@triton.jit
def _load_digit(
    base_ptr, first, X: tl.constexpr, DIGIT: tl.constexpr, ALIGN: tl.constexpr, TOKENS: tl.constexpr,
    TURNED: tl.constexpr, FOURS: tl.constexpr,
):  # fmt: skip
    """Words of a digit [tokens, columns], and of its narrow plane if it is cut.

    TURNED: [columns, tokens]. FOURS: tokens are in the order of `_by_fours`.
    """
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    WIDTH: tl.constexpr = fold_width(OWN, digit_channels(X.KEPT, X.HIGH, DIGIT))
    RANGE: tl.constexpr = 2 * (2 * DIGIT + TURNED)
    if TURNED:
        column = tl.arange(0, WIDTH)[:, None]
    else:
        column = tl.arange(0, WIDTH)[None, :]
    word = _load_plane(base_ptr, first, column, X, DIGIT, 0, ALIGN, TOKENS, RANGE, FOURS)
    low = word
    if is_cut(OWN):
        low = _load_plane(base_ptr, first, column, X, DIGIT, 1, ALIGN, TOKENS, RANGE + 1, FOURS)
    return word, low


@triton.jit
def _load_shifts(shifts_ptr, X: tl.constexpr, DIGIT: tl.constexpr, TURNED: tl.constexpr):
    """How far the copies of a digit's words are shifted, and of its narrow plane's."""
    WIDTH: tl.constexpr = fold_width(digit_bits(X.BITS, DIGIT), digit_channels(X.KEPT, X.HIGH, DIGIT))
    at = shifts_first(X.BITS, X.KEPT, X.HIGH, DIGIT) + tl.arange(0, WIDTH)
    if TURNED:
        at = at[:, None]
    else:
        at = at[None, :]
    return tl.load(shifts_ptr + at), tl.load(shifts_ptr + WIDTH + at)


@triton.jit
def _fold_digit(words, shifts, X: tl.constexpr, DIGIT: tl.constexpr, PORTABLE: tl.constexpr):
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    D: tl.constexpr = digit_channels(X.KEPT, X.HIGH, DIGIT)
    word = fold(words[0], shifts[0], OWN, D, 0, PORTABLE)
    low = words[1]
    if is_cut(OWN):
        low = fold(low, shifts[1], OWN, D, 1, PORTABLE)
    return word, low


@triton.jit
def _add_scores(
    score, words, above, above_shift, queries, step_ptr, unit, X: tl.constexpr, DIGIT: tl.constexpr,
    PORTABLE: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Scores plus the products of a digit with the queries; `step_ptr` is the first channel's scale.

    `words` are folded; `above` are those of the digit above it if they merge, which are not, and their shift. PLACED:
    whether `_in_place` has laid out the queries.
    """
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    MERGED: tl.constexpr = fold_fields(OWN, X.HIGH) if merges(X.BITS, X.KEPT, X.HIGH) else 0
    D: tl.constexpr = digit_channels(X.KEPT, X.HIGH, DIGIT)
    CHANNELS: tl.constexpr = fold_channels(OWN, D)
    WIDTH: tl.constexpr = fold_width(OWN, D)
    # bytes are loaded by fours: as small as they are, they would not be copied asynchronously
    FOURS: tl.constexpr = step_ptr.dtype.element_ty == tl.uint8 and CHANNELS % 4 == 0
    if FOURS:
        column = tl.arange(0, WIDTH // 4) * 4
    else:
        column = tl.arange(0, WIDTH)
    step_ptr += column[:, None]
    if PLACED:
        # by each column: few numbers would be copied by the threads that have them in the product, two at a time
        step_ptr = tl.broadcast_to(step_ptr, [WIDTH, score.shape[1]])
    for f in tl.static_range(fold_fields(OWN, D)):
        at = step_ptr + f * CHANNELS
        if FOURS:
            at = at.to(tl.pointer_type(tl.int32), bitcast=True)
        if CHANNELS == WIDTH:
            step = tl.load(at)
        else:
            step = tl.load(at, mask=(column < CHANNELS)[:, None], other=0)
        if FOURS:
            step = four_steps(step, PORTABLE)
        else:
            step = narrow_step(step)
        if step.dtype != tl.float16:
            step = (step.to(tl.float32) * unit).to(tl.float16)
        if f < MERGED:
            code = merged_field(words[0], above, above_shift, f, X.KEPT, X.HIGH, PORTABLE)
        else:
            code = field(words[0], words[1], f, OWN, D, PORTABLE)
        score = tl.dot(code, queries[f] * step, score)
    return score


@triton.jit
def _add_group(
    product, words, queries, g, X: tl.constexpr, DIGIT: tl.constexpr, PORTABLE: tl.constexpr
):  # fmt: skip
    """Products of a digit with the queries, of the channels of group `g` alone."""
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    FIELDS: tl.constexpr = X.GROUP // fold_channels(OWN, X.D)
    for f in tl.static_range(g * FIELDS, (g + 1) * FIELDS):
        code = field(words[0], words[1], f, OWN, X.D, PORTABLE)
        product = tl.dot(code, queries[f], product)
    return product


@triton.jit
def _token_scores(
    words, queries, sums, k, first, K: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, PORTABLE: tl.constexpr
):  # fmt: skip
    """Scores of keys with scales per token: products of each group of channels by its scales, and offsets by `sums`
    of the queries' channels."""
    GROUPS: tl.constexpr = K.D // K.GROUP
    score = tl.zeros([TOKENS, N], tl.float32)
    for g in tl.static_range(GROUPS):
        product = tl.zeros([TOKENS, N], tl.float32)
        for d in tl.static_range(digit_count(K.BITS)):
            product = _add_group(product, words[d], queries[d], g, K, d, PORTABLE)
        step = narrow_step(_of_tokens(k.scale, first, g, GROUPS, TOKENS)).to(tl.float32)
        zero = as_offset(_of_tokens(k.zero, first, g, GROUPS, TOKENS), step)
        # each contracted into one instruction
        score += zero[:, None] * sums[g][None, :]
        score += product * step[:, None]
    return score


@triton.jit
def _of_tokens(ptr, first, g, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """Number `g` of the GROUPS that each token has, from row `first` on, a multiple of 4.

    By words: single ones are not copied asynchronously, and bytes lay out the operands of later products.
    """
    BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    PER: tl.constexpr = 32 // BITS
    token = tl.arange(0, TOKENS)
    if PER == 1:
        return tl.load(ptr + first * GROUPS + token * GROUPS + g)
    at = (ptr + first * GROUPS).to(tl.pointer_type(tl.int32), bitcast=True)
    if GROUPS % PER == 0:
        # the same word serves several groups
        word = tl.load(at + token * (GROUPS // PER) + g // PER) >> (g % PER * BITS)
    else:
        place = token * GROUPS + g
        word = tl.load(at + place // PER) >> (place % PER * BITS)
    if BITS == 16:
        number = word.to(tl.int16).to(ptr.dtype.element_ty, bitcast=True)
    else:
        number = word.to(ptr.dtype.element_ty)
    return number


@triton.constexpr_function
def _placed(TURNED, scale_dtype, WARPS):
    """Whether queries are laid out by `_in_place`.

    Not for scales of a byte, of which a thread has four in a row; nor where warps share tokens, which exchange through
    shared memory whatever the layout is; nor for orders of tiles.
    """
    return WARPS == 1 and scale_dtype != tl.uint8 and TURNED != TILED


@triton.constexpr_function
def _by_product(GROUPS, TURNED, SYMMETRIC, zero_dtype):
    """Whether the offsets of values are summed up by products: those of several groups, if they are half precision."""
    return GROUPS >= 4 and zero_dtype == tl.float16 and TURNED == 0 and not SYMMETRIC


@triton.jit
def _shift_rows(rows, half, zero_ptr, token, GROUPS: tl.constexpr):
    """Rows [16, N], one for each group, plus the products of weights [TOKENS, N] and the offsets of values."""
    group = tl.arange(0, 16)[:, None]
    zero = tl.load(zero_ptr + token[None, :] * GROUPS + group, mask=group < GROUPS, other=0.0)
    return tl.dot(zero, half, rows)


@triton.constexpr_function
def _turns(KIND, SHARED, PORTABLE, WARPS):
    """Whether `movmatrix` turns weights.

    With several warps they go through shared memory, and under a mask of its own for each head they lie as it does.
    """
    return TURNS.value and not PORTABLE and WARPS == 1 and (KIND == 0 or SHARED)


@triton.constexpr_function
def _takes_fours(scale_dtypes):
    """Whether a thread has four tokens in a row of an operand: where scales of a byte are joined."""
    return BY_FOURS.value and tl.uint8 in scale_dtypes


@triton.jit
def _turned(weight, TURN: tl.constexpr, FOURS: tl.constexpr):
    """Weights [TOKENS, N] of half precision as they are, each in the thread that has it as an operand of a product.

    A product leaves them in the threads in which its transpose would need them. Triton exchanges eight of them by two
    shuffles and four permutations, for which there is one instruction. FOURS: in the order of `_by_fours`, so that what
    a thread then has are four in a row.
    """
    TOKENS: tl.constexpr = weight.shape[0]
    N: tl.constexpr = weight.shape[1]
    if not TURN:
        return weight
    blocks = tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r",
        [weight],
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )
    blocks = tl.reshape(blocks, [TOKENS // 8, 8, N // 8, 8])
    turned = tl.reshape(tl.permute(blocks, [0, 3, 2, 1]), [TOKENS, N])
    if FOURS:
        turned = _rows_by_fours(turned)
    return turned


@triton.jit
def _add_values(outs, words, scaled, fade, X: tl.constexpr, DIGIT: tl.constexpr, PORTABLE: tl.constexpr):
    """The sums of a digit's values by the weights of their groups, after what was summed before has faded."""
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    FIRST: tl.constexpr = digit_sums(X.BITS, X.D, X.GROUP, DIGIT)
    sums = ()
    for f in tl.static_range(fold_fields(OWN, X.D)):
        tile = field(words[0], words[1], f, OWN, X.D, PORTABLE)
        for g in tl.static_range(field_first(OWN, X.D, X.GROUP, f), field_end(OWN, X.D, X.GROUP, f)):
            out = outs[FIRST + field_sum(OWN, X.D, X.GROUP, f, g)] * fade[None, :]
            sums = sums + (tl.dot(tile, scaled[g], out),)
    return sums


@triton.jit
def _unhidden(score, mask, pages, first_position, token, S: tl.constexpr, PAGE: tl.constexpr):
    """Scores of a share's tokens under the mask; of pages, without those of sinks."""
    if PAGE > 0:
        score = tl.where((token >= pages.hidden)[:, None], score, -float("inf"))
    else:
        score = under_mask(score, mask, first_position + token, token >= 0, S)
    return score


@triton.jit
def _unskipped(score, skip_ptr, first, TOKENS: tl.constexpr):
    """Scores of the tokens from row `first` on, a multiple of 4, without those that are skipped."""
    token = tl.arange(0, TOKENS)
    # bytes by words, which are copied asynchronously; each token its own, for a join beside bytes of a mask makes
    # Triton 3.6 lay out operands for 4-bit numbers
    four = tl.load((skip_ptr + first).to(tl.pointer_type(tl.int32), bitcast=True) + token // 4)
    return tl.where((((four >> (token % 4 * 8)) & 0xFF) == 0)[:, None], score, -float("inf"))


@triton.jit
def _sweep(
    k, v, mask, shifts_ptr, first_position, first_k_row, first_v_row, begin, steps, queries, offset_ptr,
    asked, restore, headroom, cap, k_unit, v_unit, sums, pages,
    K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`steps` steps of TOKENS tokens from group `begin` of the share; returns `sums` after them.

    `sums`: (top, total, shifts, outs, least), of which the last is the least maximum of a step's scores, if K's
    scales are guessed.

    MASKED: whether the mask is read; if not, it must change nothing in these steps. SPREAD: over how many sets
    of columns the groups of a step are spread; each has the queries once, sees its group alone and is summed
    up by itself. A step has as many groups or one, or several where scales are per token. `asked`: pointers of the queries of each column, their factor
    and that of raw channels, for what is made of them in every step; with scales per token also sums of each group.
    """
    KD: tl.constexpr = digit_count(K.BITS)
    VD: tl.constexpr = digit_count(V.BITS)
    SPREAD: tl.constexpr = P.SPREAD
    VG: tl.constexpr = V.D // V.GROUP
    STEPS: tl.constexpr = max(1, P.UNIT // TOKENS)
    SLOTS: tl.constexpr = max(1, TOKENS // P.UNIT)
    WORDS: tl.constexpr = VG > 1 and P.V_ALIGN % 4 == 0
    BY_PRODUCT: tl.constexpr = _by_product(VG, V.TURNED, V.SYMMETRIC, v.zero.dtype.element_ty)
    PLACED: tl.constexpr = _placed(K.TURNED, k.scale.dtype.element_ty, P.WARPS)
    GUESSED: tl.constexpr = _guessed(
        K.AXIS, K.D, k.scale.dtype.element_ty, v.scale.dtype.element_ty,
        S.KIND == 0 and not S.CAPPED and not S.SKIP, P.SINGLE, P.PAGE,
    )  # fmt: skip
    # of columns that no group is left for all scores are hidden
    BEFORE: tl.constexpr = GUESSED and SPREAD > SLOTS
    TURN: tl.constexpr = _turns(S.KIND, S.SHARED, P.PORTABLE, P.WARPS)
    FOURS: tl.constexpr = TURN and _takes_fours((k.scale.dtype.element_ty, v.scale.dtype.element_ty))
    top, total, shifts, outs, least = sums
    # rows that a step may begin with are multiples of it
    K_ALIGN: tl.constexpr = min(TOKENS, P.UNIT)
    ALIGN: tl.constexpr = min(K_ALIGN, P.V_ALIGN)
    token = tl.arange(0, TOKENS)
    first_group = first_k_row // P.UNIT
    column = tl.arange(0, N)
    slot = column // (N // SPREAD)
    own = (token // P.UNIT)[:, None] == slot[None, :]

    k_shifts = ()
    for d in tl.static_range(KD):
        k_shifts = k_shifts + (_load_shifts(shifts_ptr, K, d, False),)
    v_shifts = ()
    for d in tl.static_range(VD):
        v_shifts = v_shifts + (
            _load_shifts(shifts_ptr + shifts_first(K.BITS, K.KEPT, K.HIGH, KD), V, d, True),
        )

    for i in tl.range(0, steps, num_stages=STAGES):
        step_group = begin + i // STEPS * SLOTS
        first = begin * P.UNIT + i * TOKENS
        k_first = first_k_row + first
        v_first = first_v_row + first
        k_at = k
        v_at = v
        if P.PAGE > 0:
            # a step lies in one page, of which a share has whole ones
            page = first // P.PAGE
            k_at = _paged(k, pages.k_buffers, pages.k_strides, pages, page, True)
            v_at = _paged(v, pages.v_buffers, pages.v_strides, pages, page, True)
            k_first = first % P.PAGE
            v_first = k_first
        v_row = v_first + token
        k_words = ()
        for d in tl.static_range(KD):
            k_words = k_words + (_load_digit(k_at.qdata, k_first, K, d, K_ALIGN, TOKENS, False, False),)
        v_words = ()
        for d in tl.static_range(VD):
            v_words = v_words + (_load_digit(v_at.qdata, v_first, V, d, ALIGN, TOKENS, True, FOURS),)
        # of each column, if the columns have several groups
        if SPREAD > 1:
            own_group = step_group + tl.minimum(slot, SLOTS - 1)
            scale_group = first_group + own_group
            if P.PAGE > 0:
                scale_group = own_group % (P.PAGE // P.UNIT)
            step_ptr = k_at.scale + scale_group[None, :] * K.D
        elif P.PAGE > 0:
            step_ptr = k_at.scale + k_first // P.UNIT * K.D
        else:
            step_ptr = k_at.scale + (first_group + step_group) * K.D

        # scores
        score = tl.zeros([TOKENS, N], tl.float32)
        folded = ()
        for d in tl.static_range(summed_digits(K.BITS, K.KEPT, K.HIGH)):
            folded = folded + (_fold_digit(k_words[d], k_shifts[d], K, d, P.PORTABLE),)
        order_ptr = k_at.order
        if K.TURNED == TILED:
            order_ptr += k_first // k_at.tile * K.D
            if k.scale.dtype.element_ty == tl.uint8 and order_ptr.dtype.element_ty == tl.uint8:
                # bytes, and the join that scales of a byte need, before a product make Triton 3.6 lay out its
                # operands for 4-bit numbers, of which 16 channels have too few: it multiplied others
                order_ptr = order_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
            own_queries = ()
            for d in tl.static_range(summed_digits(K.BITS, K.KEPT, K.HIGH)):
                own_queries = own_queries + (
                    _queries(asked[0], order_ptr, mask.column_ok, asked[1], K, d, False),
                )
        else:
            own_queries = queries
        if K.RAW > 0:
            score = _add_exact(
                score,
                k_at.exact,
                k_first + token,
                asked[0],
                order_ptr,
                mask.column_ok,
                asked[2],
                K,
                P.PRECISION,
            )
        if K.AXIS == 0:
            for d in tl.static_range(summed_digits(K.BITS, K.KEPT, K.HIGH)):
                score = _add_scores(
                    score,
                    folded[d],
                    k_words[KD - 1][0],
                    k_shifts[KD - 1][0],
                    own_queries[d],
                    step_ptr,
                    k_unit,
                    K,
                    d,
                    P.PORTABLE,
                    PLACED,
                )
        else:
            score = _token_scores(folded, queries, asked[3:], k_at, k_first, K, N, TOKENS, P.PORTABLE)
        if K.AXIS == 1:
            offset = tl.zeros([N], tl.float32)
        elif SPREAD > 1:
            offset = tl.load(offset_ptr + own_group * N + column)
        else:
            offset = tl.load(offset_ptr + step_group * N + column)

        # online softmax
        if BEFORE:
            least = tl.minimum(least, tl.max(score, 0))
        if S.KIND != 2 and not S.CAPPED:
            if MASKED:
                # what is hidden stays at minus infinity: `restore` is positive
                score = _unhidden(score, mask, pages, first_position, first + token, S, P.PAGE)
            if S.SKIP:
                score = _unskipped(score, mask.skip, k_first, TOKENS)
            if SPREAD > 1:
                score = tl.where(own, score, -float("inf"))
            largest = tl.max(score, 0)
            new_top = tl.maximum(top, largest * restore + (offset - headroom))
            weight = tl.exp2(score * restore[None, :] + (offset - new_top)[None, :])
        else:
            score = score * restore[None, :] + offset[None, :]
            if S.CAPPED:
                score = capped(score, cap)
            if MASKED:
                score = _unhidden(score, mask, pages, first_position, first + token, S, P.PAGE)
            if S.SKIP:
                score = _unskipped(score, mask.skip, k_first, TOKENS)
            if SPREAD > 1:
                score = tl.where(own, score, -float("inf"))
            largest = tl.max(score, 0)
            new_top = tl.maximum(top, largest - headroom)
            weight = exp(score - new_top[None, :], S.KIND)
        if GUESSED and not BEFORE:
            least = tl.minimum(least, largest)
        fade = exp(top - new_top, S.KIND)
        top = new_top
        # sums over tokens stay apart by the token's place among 8: no exchange between threads
        total = total * fade[None, :] + tl.sum(tl.reshape(weight, [TOKENS // 8, 8, N]), 0)

        half = weight.to(tl.float16)
        new_shifts = ()
        scaled = ()
        if BY_PRODUCT:
            own_token = _by_fours(token) if FOURS else token
            rows = shifts[0] * fade[None, :]
            rows = _shift_rows(rows, _turned(half, TURN, FOURS), v_at.zero, v_first + own_token, VG)
            new_shifts = (rows,)
        for g in tl.static_range(VG):
            # one by one where rows begin anywhere, as a word of four would not be aligned; and where there are 16,
            # as for orders of tiles above: a mask of bytes and the join are too much for Triton 3.6
            if VG == 1 and v.scale.dtype.element_ty == tl.uint8 and P.V_ALIGN % 4 == 0 and TOKENS > 16:
                four = v_at.scale + v_first + tl.arange(0, TOKENS // 4) * 4
                v_step = four_steps(tl.load(four.to(tl.pointer_type(tl.int32), bitcast=True)), P.PORTABLE)
            elif WORDS:
                v_step = narrow_step(_of_tokens(v_at.scale, v_first, g, VG, TOKENS))
            else:
                v_step = narrow_step(tl.load(v_at.scale + v_row * VG + g))
            if BY_PRODUCT:
                v_zero = v_step
            elif WORDS and not V.SYMMETRIC:
                v_zero = as_offset(_of_tokens(v_at.zero, v_first, g, VG, TOKENS), v_step.to(tl.float32))
            elif not V.SYMMETRIC:
                v_zero = as_offset(tl.load(v_at.zero + v_row * VG + g), v_step.to(tl.float32))
            step = v_step.to(tl.float32)
            if v_step.dtype != tl.float16:
                v_step = (step * v_unit).to(tl.float16)
            product = half * v_step[:, None]
            scaled = scaled + (_turned(product, TURN, FOURS),)
            if BY_PRODUCT:
                share = weight
            elif V.TURNED == ROTATED or V.SYMMETRIC:
                # codes count from their middle: what rounding the weights makes of their mean is alike in all
                # channels, which rotated back is one channel
                share = product.to(tl.float32) * -middle(V.BITS)
                if v.scale.dtype.element_ty != tl.float16 and v.scale.dtype.element_ty != tl.uint8:
                    share = share * (1.0 / v_unit)
                if not V.SYMMETRIC:
                    share += weight * (v_zero + step * middle(V.BITS))[:, None]
            elif S.KIND != 0 and not S.SHARED:
                # under a mask of its own for each column, several lanes have the same sum
                share = rounded_product(weight, v_zero[:, None])
            else:
                share = weight * v_zero[:, None]
            if not BY_PRODUCT:
                shift = tl.sum(tl.reshape(share, [TOKENS // 8, 8, N]), 0)
                new_shifts = new_shifts + (shifts[g] * fade[None, :] + shift,)
        shifts = new_shifts
        new_outs = ()
        for d in tl.static_range(VD):
            folded = _fold_digit(v_words[d], v_shifts[d], V, d, P.PORTABLE)
            new_outs = new_outs + _add_values(outs, folded, scaled, fade, V, d, P.PORTABLE)
        outs = new_outs
    return top, total, shifts, outs, least


@triton.jit
def _in_order(query_ptr, order_ptr, gathered_ptr, column_ok, N: tl.constexpr, X: tl.constexpr):
    """Copy queries to `gathered_ptr` with their channels in the order in which they are packed; pointers to the copies.

    In registers, channels from everywhere would spoil the layout in which queries and scales are multiplied.
    """
    channel = tl.arange(0, X.DP)
    column = tl.arange(0, N)
    channel_ok = (channel < X.D)[:, None]
    at = tl.load(order_ptr + channel, mask=channel < X.D, other=0)
    q = tl.load(query_ptr[None, :] + at[:, None], mask=channel_ok & column_ok[None, :], other=0.0)
    gathered = gathered_ptr.to(tl.pointer_type(q.dtype), bitcast=True) + column * X.D
    tl.store(gathered[None, :] + channel[:, None], q, mask=channel_ok)
    tl.debug_barrier()
    return gathered


@triton.jit
def _in_tile(query_ptr, order_ptr, first, channel, ok, X: tl.constexpr):
    """Queries in packed channels from `first` on, as float32 [channels, N]; ordered here if orders are of tiles."""
    at = first + channel
    if X.TURNED == TILED:
        if order_ptr.dtype.element_ty == tl.int32:
            # words of four numbers
            at = (tl.load(order_ptr + at // 4, mask=at < X.D, other=0) >> (at % 4 * 8)) & 0xFF
        else:
            at = tl.load(order_ptr + at, mask=at < X.D, other=0).to(tl.int32)
    return tl.load(query_ptr[None, :] + at[:, None], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _add_exact(
    score, exact_ptr, row, query_ptr, order_ptr, column_ok, unit, X: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores plus the products of raw channels with the queries."""
    channel = tl.arange(0, max(16, next_power_of_2(X.RAW)))
    channel_ok = channel < X.RAW
    ok = column_ok[None, :] & channel_ok[:, None]
    q = _in_tile(query_ptr, order_ptr, X.D - X.APART, channel, ok, X)
    exact = tl.load(
        exact_ptr + row[:, None] * X.RAW + channel[None, :], mask=channel_ok[None, :], other=0.0
    ).to(tl.float32)
    return tl.dot(exact, q * unit[None, :], score, input_precision=PRECISION)


@triton.jit
def _tile_offsets(
    offset_ptr, query_ptr, k, first_row, groups, scale, column_ok, pages,
    N: tl.constexpr, X: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Products of queries and offsets of each group, where orders are of tiles."""
    COUNT: tl.constexpr = fold_channels(digit_bits(X.BITS, 0), X.D)
    channel = tl.arange(0, fold_width(digit_bits(X.BITS, 0), X.D))
    channel_ok = channel < COUNT
    ok = column_ok[None, :] & channel_ok[:, None]
    for group in range(groups):
        row = first_row + group * X.GROUP
        k_at = k
        if PAGE > 0:
            k_at = _paged(k, pages.k_buffers, pages.k_strides, pages, row // PAGE, True)
            row = row % PAGE
        offset = tl.zeros([N], tl.float32)
        # a few channels at a time: all of them spill
        for f in tl.range(0, X.D, COUNT):
            q = _in_tile(query_ptr, k_at.order + row // k.tile * X.D, f, channel, ok, X)
            at = row // X.GROUP * X.D + f + channel
            step = narrow_step(tl.load(k_at.scale + at, mask=channel_ok, other=0)).to(tl.float32)
            zero = as_offset(tl.load(k_at.zero + at, mask=channel_ok, other=0), step)
            offset += tl.sum(q * zero[:, None], 0)
        tl.store(offset_ptr + group * N + tl.arange(0, N), offset * scale)


@triton.constexpr_function
def _guessed(AXIS, D, k_scale_dtype, v_scale_dtype, PLAIN, SINGLE, PAGE):
    """Whether the largest scales of a share are guessed from some of them, not looked for in all.

    Reading all takes up to 15 % more bytes, and the GPU does nothing else meanwhile; where a share has few groups it
    takes less than a guess. Those of keys that are bytes are read anyway, as offsets count in scales. What is larger
    than a guess shows as scores of which none is more than minus infinity: masks, which would spill, make such, and
    caps hide them. Other heads would spill, too, and pages are not measured.
    """
    wide = k_scale_dtype != tl.uint8 and v_scale_dtype != tl.uint8
    return AXIS == 0 and D in (64, 128) and wide and PLAIN and not SINGLE and PAGE == 0


@triton.jit
def _value_steps(v, pages, first_row, place, count, GROUPS: tl.constexpr, PAGE: tl.constexpr):
    """Scales number `place` of the `count` of a share's values; zeros behind the last."""
    place_ok = place < count
    at = v.scale + first_row * GROUPS + place
    if PAGE > 0:
        own = _paged(v, pages.v_buffers, pages.v_strides, pages, place // (PAGE * GROUPS), place_ok)
        at = own.scale + place % (PAGE * GROUPS)
    return narrow_step(tl.load(at, mask=place_ok, other=0))


@triton.jit
def _largest_value_step(
    v, pages, first_row, count, LOOK: tl.constexpr, ONCE: tl.constexpr, GROUPS: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """The largest of the `count` scales of a share's values, LOOK of them at a time, or all at ONCE."""
    largest = TINY
    for part in tl.range(0, LOOK if ONCE else count, LOOK, num_stages=1 if ONCE else 2):
        steps = _value_steps(v, pages, first_row, part + tl.arange(0, LOOK), count, GROUPS, PAGE)
        largest = tl.maximum(largest, tl.max(steps.to(tl.float32), 0))
    return largest


@triton.jit
def _key_steps(k, first_group, group, groups, K: tl.constexpr):
    """Scales [len(group), DP] of a share's groups number `group`, in a row; zeros behind the last of `groups`."""
    COUNT: tl.constexpr = group.shape[0]
    group = tl.reshape(tl.broadcast_to(group[:, None], [COUNT, K.DP]), [COUNT * K.DP])
    channel = tl.arange(0, COUNT * K.DP) % K.DP
    ok = (group < groups) & (channel < K.KEPT)
    at = (first_group + group) * K.D + channel
    return narrow_step(tl.load(k.scale + at, mask=ok, other=0))


@triton.jit
def _largest_key_step(k, first_group, groups, K: tl.constexpr):
    """The largest scale of a share's keys, some groups at a time."""
    largest = TINY
    for part in tl.range(0, groups, 4, num_stages=1):
        steps = _key_steps(k, first_group, part + tl.arange(0, 4), groups, K)
        largest = tl.maximum(largest, tl.max(steps, 0).to(tl.float32))
    return largest


@triton.jit
def _channel_offsets(
    offset_ptr, query_ptr, k, first_k_row, groups, scale, column_ok, pages,
    K: tl.constexpr, N: tl.constexpr, P: tl.constexpr, GUESSED: tl.constexpr,
):  # fmt: skip
    """Stores products of queries and offsets of each group; returns the largest channels of queries, and scales unless
    they are guessed."""
    first_group = first_k_row // P.UNIT
    BYTES: tl.constexpr = k.scale.dtype.element_ty == tl.uint8
    # a loop of one turn is none: what is read at first is then on its way together. More turns are read ahead, but not
    # of bytes: then more programs fit, and short ones run beside long ones
    STAGES: tl.constexpr = 1 if P.SINGLE or BYTES else (3 if GUESSED else 2)
    # channels of a product: few where there are few groups, for a short program waits for what it exchanges
    FIELD: tl.constexpr = fold_width(digit_bits(K.BITS, 0), K.D)
    HELD: tl.constexpr = next_power_of_2(READ_AHEAD * P.WARPS // P.PART + 1) // 2
    WIDTH: tl.constexpr = FIELD if BYTES or N > 8 or P.PART <= FEW_GROUPS else min(K.DP, max(FIELD, HELD))
    PIECES: tl.constexpr = (K.D + WIDTH - 1) // WIDTH
    # whether all of them are read before any is multiplied. Triton moves what stores a tile in shared memory up to its
    # load, but not beyond a choice: so there is one
    CHOSEN: tl.constexpr = STAGES == 1 and not BYTES
    AHEAD: tl.constexpr = PIECES if CHOSEN else 1

    # over all groups of the share: q . offset, which is kept in memory: in registers, small groups would spill
    largest = tl.zeros([N], tl.float32) + TINY
    # as narrow as they are: numbers of half precision are compared two at a time
    largest_k = tl.zeros([P.PART, WIDTH], narrow_step(tl.load(k.scale)).dtype)
    for part in tl.range(0, P.PART if P.SINGLE else groups, P.PART, num_stages=STAGES):
        group = part + tl.arange(0, P.PART)
        scale_ptr = k.scale
        zero_ptr = k.zero
        at = (first_group + group)[:, None] * K.D
        if P.PAGE > 0:
            own_page = group // (P.PAGE // P.UNIT)
            own = _paged(k, pages.k_buffers, pages.k_strides, pages, own_page, group < groups)
            scale_ptr = own.scale[:, None]
            zero_ptr = own.zero[:, None]
            at = (group % (P.PAGE // P.UNIT))[:, None] * K.D
        offsets = tl.zeros([P.PART, N], tl.float32)
        for ahead in tl.static_range(0, PIECES, AHEAD):
            asked = ()
            steps = ()
            zeros = ()
            for i in tl.static_range(ahead, min(ahead + AHEAD, PIECES)):
                channel = i * WIDTH + tl.arange(0, WIDTH)
                q_ok = column_ok[None, :] & (channel < K.D)[:, None]
                asked = asked + (tl.load(query_ptr[None, :] + channel[:, None], mask=q_ok, other=0.0),)
                at_ok = (group < groups)[:, None] & (channel < K.D)[None, :]
                if GUESSED:
                    steps = steps + (largest_k,)
                else:
                    step = tl.load(scale_ptr + at + channel[None, :], mask=at_ok, other=0)
                    steps = steps + (narrow_step(step),)
                if K.TURNED != TILED:
                    zero = tl.load(zero_ptr + at + channel[None, :], mask=at_ok, other=0)
                    if CHOSEN and PIECES > 1:
                        zero = tl.where(at_ok, zero, 0)
                    zeros = zeros + (zero,)
            for i in tl.static_range(min(AHEAD, PIECES - ahead)):
                channel = (ahead + i) * WIDTH + tl.arange(0, WIDTH)
                q = asked[i]
                if CHOSEN and PIECES == 1:
                    q = tl.where(column_ok[None, :] & (channel < K.D)[:, None], q, 0.0)
                q = q.to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(q), 0))
                k_steps = steps[i]
                if K.TURNED != TILED:
                    zero = as_offset(zeros[i], k_steps.to(tl.float32))
                    offsets = tl.dot(zero, q, offsets, input_precision=P.PRECISION)
                if not GUESSED:
                    if K.KEPT < K.D:
                        # what is dropped has an offset alone
                        k_steps = tl.where((channel < K.KEPT)[None, :], k_steps, 0.0)
                    largest_k = tl.maximum(largest_k, k_steps)
        if K.TURNED != TILED:
            tl.store(offset_ptr + group[:, None] * N + tl.arange(0, N)[None, :], offsets * scale)
    if K.TURNED == TILED:
        _tile_offsets(offset_ptr, query_ptr, k, first_k_row, groups, scale, column_ok, pages, N, K, P.PAGE)
    return largest, largest_k


@triton.jit
def _group_sums(query_ptr, column_ok, K: tl.constexpr, N: tl.constexpr):
    """The largest channels of queries, and the sums of the channels of each group that has scales per token."""
    channel = tl.arange(0, next_power_of_2(K.GROUP))
    ok = column_ok[None, :] & (channel < K.GROUP)[:, None]
    largest = tl.zeros([N], tl.float32) + TINY
    sums = ()
    for g in tl.static_range(K.D // K.GROUP):
        at = query_ptr[None, :] + g * K.GROUP + channel[:, None]
        q = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(q), 0))
        sums = sums + (tl.sum(q, 0),)
    return largest, sums


@triton.jit
def _in_place(query_ptr, column_ok, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """CHANNELS channels of queries as float32 [WIDTH, N], each in the thread that has it in a product.

    A thread of `mma` has channels 2 i, 2 i + 1, 2 i + 8 and 2 i + 9 of 16. Those of a load lie so, too, where eights of
    channels are columns and a thread reads two in a row: then nothing is exchanged in front of every product.
    """
    N: tl.constexpr = query_ptr.shape[0]
    EIGHTS: tl.constexpr = WIDTH // 8
    PAIR: tl.constexpr = 2 * query_ptr.dtype.element_ty.primitive_bitwidth // 8
    low = tl.arange(0, 8)[:, None]
    high = tl.arange(0, EIGHTS)[:, None] * 8
    columns = tl.reshape(query_ptr[None, :] + high, [EIGHTS * N])
    if CHANNELS % 2 == 0:
        # launchers see to it that rows of queries begin at pairs, which a reshape forgets; then each field does
        columns = tl.multiple_of(columns, PAIR)
    left = tl.reshape(tl.where(column_ok[None, :], CHANNELS - high, 0), [EIGHTS * N])
    at = tl.max_contiguous(columns[None, :] + low, [2, 1])
    if CHANNELS % 2 == 0:
        low = low // 2 * 2  # of a pair, none or both
    q = tl.load(at, mask=low < left[None, :], other=0.0).to(tl.float32)
    return tl.reshape(tl.permute(tl.reshape(q, [8, EIGHTS, N]), [1, 0, 2]), [WIDTH, N])


@triton.jit
def _queries(
    query_ptr, order_ptr, column_ok, shrink, X: tl.constexpr, DIGIT: tl.constexpr, PLACED: tl.constexpr
):
    """The queries that a digit's fields are multiplied with, as half precision; `query_ptr` is that of each column.

    PLACED: `_in_place` lays them out.
    """
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    D: tl.constexpr = digit_channels(X.KEPT, X.HIGH, DIGIT)
    CHANNELS: tl.constexpr = fold_channels(OWN, D)
    WIDTH: tl.constexpr = fold_width(OWN, D)
    channel = tl.arange(0, WIDTH)
    ok = column_ok[None, :] & (channel < CHANNELS)[:, None]
    found = ()
    for f in tl.static_range(fold_fields(OWN, D)):
        if PLACED:
            q = _in_place(query_ptr + f * CHANNELS, column_ok, CHANNELS, WIDTH)
        else:
            q = _in_tile(query_ptr, order_ptr, f * CHANNELS, channel, ok, X)
        factor = field_factor(OWN, D, f) * digit_factor(X.BITS, DIGIT)
        found = found + ((q * shrink[None, :] * factor).to(tl.float16),)
    return found


@triton.jit
def _store_digit(
    partial_ptr, outs, shifts, share, column_ok, unit, N: tl.constexpr, X: tl.constexpr, DIGIT: tl.constexpr, SPREAD: tl.constexpr
):  # fmt: skip
    """What a digit adds to the partial output; the lowest one brings the offsets, `shifts`."""
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    CHANNELS: tl.constexpr = fold_channels(OWN, X.D)
    WIDTH: tl.constexpr = fold_width(OWN, X.D)
    FIRST: tl.constexpr = digit_sums(X.BITS, X.D, X.GROUP, DIGIT)
    ROWS: tl.constexpr = N // SPREAD
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    for f in tl.static_range(fold_fields(OWN, X.D)):
        for g in tl.static_range(field_first(OWN, X.D, X.GROUP, f), field_end(OWN, X.D, X.GROUP, f)):
            summed = outs[FIRST + field_sum(OWN, X.D, X.GROUP, f, g)]
            summed = summed * (unit * (field_factor(OWN, X.D, f) * 2.0 ** digit_above(X.BITS, DIGIT)))
            if DIGIT == 0:
                if shifts[0].shape[0] == 16:
                    own_row = tl.arange(0, 16)[:, None] == g
                    summed += tl.sum(tl.where(own_row, shifts[0], 0.0), 0)[None, :]
                else:
                    summed += tl.sum(shifts[g], 0)[None, :]
            if g == field_first(OWN, X.D, X.GROUP, f):
                out = summed
            else:
                out = tl.where((f * CHANNELS + column < g * X.GROUP)[:, None], out, summed)
        if SPREAD > 1:
            out = tl.sum(tl.reshape(rounded_product(out, share[None, :]), [WIDTH, SPREAD, ROWS]), 1)
            ok = (column < CHANNELS)[:, None]
        else:
            ok = (column < CHANNELS)[:, None] & column_ok[None, :]
        out_ptr = partial_ptr + row[None, :] * X.D + f * CHANNELS + column[:, None]
        if DIGIT > 0:
            out += tl.load(out_ptr, mask=ok, other=0.0)
        tl.store(out_ptr, out, mask=ok)


@triton.jit
def _nothing_yet(V: tl.constexpr, N: tl.constexpr, BY_PRODUCT: tl.constexpr):
    """(top, total, shifts, outs, least) before any token."""
    shifts = ()
    if BY_PRODUCT:
        shifts = (tl.zeros([16, N], tl.float32),)
    else:
        for g in tl.static_range(V.D // V.GROUP):
            shifts = shifts + (tl.zeros([8, N], tl.float32),)
    # a field that has channels of several groups is summed up with the scales of each
    outs = ()
    for d in tl.static_range(digit_count(V.BITS)):
        for _ in tl.static_range(
            digit_sums(V.BITS, V.D, V.GROUP, d), digit_sums(V.BITS, V.D, V.GROUP, d + 1)
        ):
            outs = outs + (tl.zeros([fold_width(digit_bits(V.BITS, d), V.D), N], tl.float32),)
    top = tl.zeros([N], tl.float32) + LOWEST
    return top, tl.zeros([8, N], tl.float32), shifts, outs, tl.zeros([N], tl.float32)


@triton.jit
def _fit(outs, least):
    """Whether no operand was too large for half precision: it would leave infinities, or what is no number.

    Codes are no smaller than 0, so where none is 0 scores may all be minus infinity, which has no other trace.
    """
    # 0 of finite numbers alone; summed up over threads once, for each exchange is waited for
    trace = outs[0] * 0.0 + (least * 0.0)[None, :]
    for i in tl.static_range(1, len(outs)):
        if outs[i].shape[0] == outs[0].shape[0]:
            trace += outs[i] * 0.0
        else:
            trace += tl.sum(outs[i] * 0.0, 0)[None, :]
    # an integer, whose maximum over a warp is known to be that of all its threads: what it decides does not diverge
    return tl.max((trace == 0.0).to(tl.int32) ^ 1) == 0


@triton.jit
def _attempt(
    query_ptr, k, v, mask, shifts_ptr, first_position, first_k_row, first_v_row, skipped, masked, groups,
    offset_ptr, largest, sums, k_top, v_top, scale, cap, pages,
    K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, N: tl.constexpr, P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(top, total, shifts, outs, least) of a share whose scales are at most `k_top` and `v_top`."""
    PLACED: tl.constexpr = _placed(K.TURNED, k.scale.dtype.element_ty, P.WARPS)
    BY_PRODUCT: tl.constexpr = _by_product(V.D // V.GROUP, V.TURNED, V.SYMMETRIC, v.zero.dtype.element_ty)
    # half-precision scales are used as they are; wider ones may not fit and are divided by the largest
    K_HALF: tl.constexpr = k.scale.dtype.element_ty == tl.float16 or k.scale.dtype.element_ty == tl.uint8
    V_HALF: tl.constexpr = v.scale.dtype.element_ty == tl.float16 or v.scale.dtype.element_ty == tl.uint8
    k_unit = 1.0 / k_top
    v_unit = 1.0 / v_top
    # the largest product of query (or probability) and scale is PEAK, or below it for small scales
    k_peak = tl.minimum(PEAK * k_unit, PEAK) if K_HALF else PEAK
    v_peak = tl.minimum(PEAK * v_unit, PEAK) if V_HALF else PEAK
    shrink = k_peak / largest
    queries = ()
    for d in tl.static_range(summed_digits(K.BITS, K.KEPT, K.HIGH)):
        queries = queries + (_queries(query_ptr, k.order, mask.column_ok, shrink, K, d, PLACED),)
    # undoes 2**-24 of the subnormals and the peak
    restore = largest * (scale * (16777216.0 * top_digit(K.BITS)) / k_peak)
    if not K_HALF:
        restore = restore * k_top
    asked = (query_ptr, shrink, scale / restore)
    for g in tl.static_range(len(sums)):
        asked = asked + (sums[g] * (scale / restore),)
    # probabilities are exp(score - top) with top so far below the running maximum that they peak at v_peak
    headroom = tl.log2(v_peak)
    if S.KIND == 2:
        headroom = headroom * LN2

    found = _nothing_yet(V, N, BY_PRODUCT)
    STEPS: tl.constexpr = max(1, P.UNIT // P.TOKENS)
    SLOTS: tl.constexpr = max(1, P.TOKENS // P.UNIT)
    full = (groups - skipped) // SLOTS
    if S.KIND != 0:
        masked = tl.minimum((masked - skipped + SLOTS - 1) // SLOTS, full)
        found = _sweep(
            k, v, mask, shifts_ptr, first_position, first_k_row, first_v_row, skipped, masked * STEPS,
            queries, offset_ptr, asked, restore, headroom, cap, k_unit, v_unit, found, pages,
            K, V, S, True, N, P.TOKENS, STAGES, P,
        )  # fmt: skip
    if S.KIND == 0 or S.SHARED:
        found = _sweep(
            k, v, mask, shifts_ptr, first_position, first_k_row, first_v_row, skipped + masked * SLOTS, (full - masked) * STEPS,
            queries, offset_ptr, asked, restore, headroom, cap, k_unit, v_unit, found, pages,
            K, V, S, P.PAGE > 0, N, P.TOKENS, STAGES, P,
        )  # fmt: skip
    if SLOTS > 1:
        # groups that do not fill a step
        found = _sweep(
            k, v, mask, shifts_ptr, first_position, first_k_row, first_v_row, skipped + full * SLOTS, groups - skipped - full * SLOTS,
            queries, offset_ptr, asked, restore, headroom, cap, k_unit, v_unit, found, pages,
            K, V, S, S.KIND != 0 or P.PAGE > 0, N, P.UNIT, 1, P,
        )  # fmt: skip
    return found


@triton.jit
def attend_bulk(
    query_ptr, k, v, mask, shifts_ptr, offset_ptr, gathered_ptr, partial_ptr, stats_ptr, first_position, first_k_row,
    first_v_row, groups, scale, cap, pages,
    K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One share of the packed tokens: `groups` groups of keys, or as many units of tokens with scales of their own;
    at `offset_ptr` is room for N numbers of each group.

    With P.PAGE they are tokens of the `Pages`, and the first rows are 0.

    At `gathered_ptr` is room for N queries, if channels are in an order. `query_ptr` is that of each column. K and V are `Form`s, S is a `Scores`, P `Steps`.
    """
    VD: tl.constexpr = digit_count(V.BITS)
    VG: tl.constexpr = V.D // V.GROUP
    V_HALF: tl.constexpr = v.scale.dtype.element_ty == tl.float16 or v.scale.dtype.element_ty == tl.uint8
    SPREAD: tl.constexpr = P.SPREAD
    # tells the compiler that rows can be copied in wide pieces, and how those of a block lie
    first_k_row = first_k_row // P.UNIT * P.UNIT
    first_v_row = first_v_row // P.V_ALIGN * P.V_ALIGN

    if K.TURNED == ORDERED:
        query_ptr = _in_order(query_ptr, k.order, gathered_ptr, mask.column_ok, N, K)

    LOOK: tl.constexpr = P.PART * min(MAX_LOOK, P.UNIT * next_power_of_2(VG))
    LOOKS_ONCE: tl.constexpr = P.SINGLE and P.UNIT * VG <= MAX_LOOK
    # on their way while those of keys are looked at, if they leave registers for these
    SPARE: tl.constexpr = 32 if VG == 1 and N == 8 and S.KIND == 0 else 16
    LOOKS_EARLY: tl.constexpr = LOOKS_ONCE and LOOK <= SPARE * K.DP and K.DP <= 128
    GUESSED: tl.constexpr = _guessed(
        K.AXIS, K.D, k.scale.dtype.element_ty, v.scale.dtype.element_ty,
        S.KIND == 0 and not S.CAPPED and not S.SKIP, P.SINGLE, P.PAGE,
    )  # fmt: skip
    v_scales = groups * P.UNIT * VG
    first_group = first_k_row // P.UNIT
    if GUESSED:
        # of some, from everywhere
        some = tl.arange(0, 4) * ((groups + 3) // 4)
        k_steps = _key_steps(k, first_group, some, groups, K)
        some = tl.arange(0, 64) * ((v_scales + 63) // 64)
        v_steps = _value_steps(v, pages, first_v_row, some, v_scales, VG, P.PAGE)
    elif LOOKS_EARLY:
        v_steps = _value_steps(v, pages, first_v_row, tl.arange(0, LOOK), v_scales, VG, P.PAGE)
    sums = ()
    if K.AXIS == 0:
        largest, largest_k = _channel_offsets(
            offset_ptr, query_ptr, k, first_k_row, groups, scale, mask.column_ok, pages, K, N, P, GUESSED
        )
    else:
        largest, sums = _group_sums(query_ptr, mask.column_ok, K, N)
    tl.debug_barrier()
    if GUESSED:
        v_top = tl.maximum(tl.max(v_steps, 0).to(tl.float32) * SLACK, TINY)
        k_top = tl.maximum(tl.max(k_steps, 0).to(tl.float32) * SLACK, TINY)
    else:
        if LOOKS_EARLY:
            v_top = tl.maximum(tl.max(v_steps.to(tl.float32), 0), TINY)
        else:
            v_top = _largest_value_step(v, pages, first_v_row, v_scales, LOOK, LOOKS_ONCE, VG, P.PAGE)
        # codes with scales per token are multiplied by the queries alone
        k_top = tl.maximum(tl.max(tl.max(largest_k, 1), 0).to(tl.float32), TINY) if K.AXIS == 0 else 1.0

    # groups that no query sees are left out, the mask is read up to the last token that it changes
    skipped = 0
    masked = 0
    if S.KIND != 0:
        masked = groups
        if S.SHARED:
            unseen, changed = reach(
                mask, first_position, groups * P.UNIT, S, P.PART * min(MAX_LOOK // 2, P.UNIT)
            )
            skipped = unseen // P.UNIT
            masked = tl.maximum((changed + P.UNIT - 1) // P.UNIT, skipped)

    top, total, shifts, outs, least = _attempt(
        query_ptr, k, v, mask, shifts_ptr, first_position, first_k_row, first_v_row, skipped, masked, groups,
        offset_ptr, largest, sums, k_top, v_top, scale, cap, pages, K, V, S, N, P, P.STAGES,
    )  # fmt: skip
    # written out again: in a loop, the compiler would keep in registers what a second turn needs
    if GUESSED:
        if not _fit(outs, least):
            # some scale is larger than they were taken to be
            k_top = _largest_key_step(k, first_group, groups, K)
            v_top = _largest_value_step(v, pages, first_v_row, v_scales, LOOK, False, VG, P.PAGE)
            top, total, shifts, outs, least = _attempt(
                query_ptr, k, v, mask, shifts_ptr, first_position, first_k_row, first_v_row, skipped, masked, groups,
                offset_ptr, largest, sums, k_top, v_top, scale, cap, pages, K, V, S, N, P, 1,
            )  # fmt: skip

    ROWS: tl.constexpr = N // SPREAD
    row = tl.arange(0, ROWS)
    sums = tl.sum(total, 0)
    share = sums
    if SPREAD > 1:
        whole_top = tl.max(tl.reshape(top, [SPREAD, ROWS]), 0)
        share = exp(tl.reshape(top, [SPREAD, ROWS]) - whole_top[None, :], S.KIND)
        sums = tl.sum(rounded_product(tl.reshape(sums, [SPREAD, ROWS]), share), 0)
        share = tl.reshape(share, [N])
        top = whole_top
    unit = 16777216.0
    if not V_HALF:
        unit = unit * v_top
    for d in tl.static_range(VD):
        if d > 0:
            # other threads added the digit before
            tl.debug_barrier()
        _store_digit(partial_ptr, outs, shifts, share, mask.column_ok, unit, N, V, d, SPREAD)
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + N + row, sums)
