"""Which rows see which keys, and biases."""

from typing import Any

from jax_tkg.nki.buffers import BITS, MASKED, Constants, Inputs, Logits, Place
from jax_tkg.nki.dialect import nisa, nl
from jax_tkg.nki.mask import hidden_by_key
from jax_tkg.nki.plan import KernelPlan
from jax_tkg.nki.rows import PARTITIONS, RowGroup
from jax_tkg.nki.steps.load import count_slots, has_sequence_bits, load_small
from jax_tkg.nki.steps.new_keys import load_for_pairs, load_for_rows
from jax_tkg.nki.steps.qk import partitions_of, spans_of
from jax_tkg.nki.tiles import KeyTile, Piece

EVERY_BIT = 255


def mask_cached(
    logits: Logits,
    pages: Any,
    inputs: Inputs,
    consts: Constants,
    place: Place,
    tile: KeyTile,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """Masks the logits of cached keys that a row may not see, also NaN ones.

    Returns:
        uint8 `[128, columns, pairs]`, 1 where no row of a pair sees the key; None where all are
        seen, or where unseen ones are known to be harmless.
    """
    features = plan.features
    if not tile.cached or not (tile.is_masked or features.has_mask):
        return None
    hidden: Any = None
    if tile.is_masked:
        hidden = find_hidden(inputs, pages, consts, place, tile, group, plan)
    if features.has_mask:
        hidden = join_dense(hidden, inputs, consts, place, tile, group, plan)
    heads = hidden.shape[3]
    for piece in tile.cached:
        for span in spans_of(piece, logits):
            mine = hidden[:, nl.ds(piece.column + span[3], span[2])]
            part = logits.banks[span[0]][:, nl.ds(span[1], span[2]), :]
            part = part.reshape_dim(
                2, (group.batches, group.kv_heads * group.queries, group.tokens)
            )
            if heads == 1:
                mine = mine.broadcast(3, part.shape[3])
            if mine.shape[4] == 1:
                mine = mine.broadcast(4, group.tokens)
            nisa.tensor_copy_predicated(dst=part, src=MASKED, predicate=mine)
    if not tile.is_dirty:
        return None
    return find_unseen(hidden, group)


def find_hidden(
    inputs: Inputs,
    pages: Any,
    consts: Constants,
    place: Place,
    tile: KeyTile,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """Which cached keys new tokens do not see by position: `[128, columns, b, 1, T or 1]`."""
    columns, features = tile.cached_columns, plan.features
    batches = nl.ds(group.first_batch, group.batches)
    tokens = consts.high.shape[2]
    if features.has_positions:
        positions = load_positions(inputs, tile, group)
    else:
        slots = slot_numbers(place, tile, consts, plan)
        positions = slots.expand_dim(2).broadcast(2, group.batches)
    if features.has_holes:
        positions = beyond_holes(positions, pages.holes, tile, group)
    every = positions.expand_dim(3).broadcast(3, tokens)
    low, high = bounds_here(consts, place, batches)
    if features.has_low:
        low = low.expand_dim(1).broadcast(1, columns)
    high = high.expand_dim(1).broadcast(1, columns)
    return hidden_by_key(every, low, high).expand_dim(3)


def bounds_here(consts: Constants, place: Place, batches: Any) -> tuple[Any, Any]:
    """The positions that some sequences see, low and high `[128, b, T or 1]`; low may be None.

    Of a tile placed at run time, counted from its first slot, and only those that count: a few
    bounds are moved, not the numbers of all slots.
    """
    high, low = consts.high[:, batches], consts.low
    if low != None:  # noqa: E711  (the kernel language has no `is`)
        low = low[:, batches]
    if place.behind_counted == None:  # noqa: E711
        return low, high
    last = nl.ndarray(high.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=last,
        data=high,
        op0=nl.minimum,
        operand0=place.behind_counted,
        op1=nl.subtract,
        operand1=place.first_slot,
    )
    if low == None:  # noqa: E711
        return None, last
    first = nl.ndarray(low.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=first, data=low, op0=nl.subtract, operand0=place.first_slot)
    return first, last


def beyond_holes(positions: Any, holes: Any, tile: KeyTile, group: RowGroup) -> Any:
    """Positions `[128, columns, b]`, of slots without a page behind what any row sees."""
    shape = (PARTITIONS, tile.cached_columns, group.batches)
    moved = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    for piece in tile.cached:
        columns, runs = nl.ds(piece.column, piece.subtiles), (piece.gathers, piece.run)
        mine = holes[:, nl.ds(piece.gather, piece.gathers)]
        nisa.tensor_tensor(
            dst=moved[:, columns].reshape_dim(1, runs),
            data1=positions[:, columns].reshape_dim(1, runs),
            data2=mine.expand_dim(2).broadcast(2, piece.run),
            op=nl.add,
        )
    return moved


def slot_numbers(place: Place, tile: KeyTile, consts: Constants, plan: KernelPlan) -> Any:
    """The slot of each cached key of a tile, float32 `[128, columns]`; beyond it, later ones.

    Of a tile placed at run time, counted from its first slot: the same for all of a kind.
    """
    if place.behind_counted == None:  # noqa: E711
        return count_slots(tile, place.first_slot)
    live: Any = plan.live
    if tile.cached[0].halves == live.edge.cached[0].halves:
        return consts.slots
    return count_slots(tile, 0)


def load_positions(inputs: Inputs, tile: KeyTile, group: RowGroup) -> Any:
    """The position of each cached key of a tile, `[128, columns, b]`; -1 beyond them."""
    shape = (PARTITIONS, group.batches, tile.cached_columns)
    positions = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=positions, value=-1.0)
    for piece in tile.cached:
        slots = nl.ds(tile.start + piece.start, piece.keys)
        mine = inputs.positions[nl.ds(group.first_batch, group.batches), slots]
        by_key = mine.reshape_dim(1, (piece.partitions, piece.subtiles)).permute((1, 0, 2))
        columns = nl.ds(piece.column, piece.subtiles)
        nisa.dma_copy(dst=positions[0 : piece.partitions, :, columns], src=by_key)
    return positions.permute((0, 2, 1))


def join_dense(
    hidden: Any,
    inputs: Inputs,
    consts: Constants,
    place: Place,
    tile: KeyTile,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """Hidden by position or by the dense mask: `[128, columns, b, heads or 1, T]`."""
    dense = load_hidden(inputs, consts, place, tile, group, plan)
    if hidden == None and dense.shape[3] == 1:  # noqa: E711
        return dense
    joined = nl.ndarray(dense.shape, nl.uint8, buffer=nl.sbuf)
    if hidden == None:  # noqa: E711
        nisa.tensor_copy(dst=joined, src=dense)
        return joined
    every = hidden.broadcast(3, dense.shape[3])
    if every.shape[4] == 1:
        every = every.broadcast(4, group.tokens)
    nisa.tensor_tensor(dst=joined, data1=dense, data2=every, op=nl.logical_or)
    return joined


def load_hidden(
    inputs: Inputs,
    consts: Constants,
    place: Place,
    tile: KeyTile,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """What the dense mask hides, `[128, columns, b, heads or 1, T]`."""
    if has_sequence_bits(inputs, plan):
        packed = load_dense(inputs.hidden, 1, nl.uint8, EVERY_BIT, place, tile, group, plan)
        by_batch = unpack_tokens(packed.view(nl.uint16), consts.bits, group.batches)
        return by_batch.permute((0, 1, 4, 3, 2))
    batches = group.batches
    packed = load_dense(inputs.hidden, batches, nl.uint8, EVERY_BIT, place, tile, group, plan)
    if group.tokens == 1:
        return packed
    return unpack_tokens(packed.view(nl.uint16), consts.bits, group.tokens)


def unpack_tokens(packed: Any, bits: Any, tokens: int) -> Any:
    """From bits `[128, columns, b, heads, words]` to bytes `[..., T]`, not 0 where one is set.

    Words are uint8 for 8 tokens, or uint16 for 16, see `Inputs.hidden`: with these the Vector
    engine is faster, and each gives two tokens at once. For `bits` see `Constants`.
    """
    if tokens == 1:
        return packed
    keys, columns, batches, heads, count = packed.shape
    together = 1 if packed.dtype == nl.uint8 else 2
    each = BITS if count > 1 else -(-tokens // together)
    if together == 1:
        bits = bits.view(nl.uint8)[:, 0 : 2 * each : 2]
    shape = (keys, columns, batches, heads, count * each)
    unpacked = nl.ndarray(shape, packed.dtype, buffer=nl.sbuf)
    every = bits[0:keys, 0:each].expand_dim(1).expand_dim(2).expand_dim(3).broadcast(1, columns)
    if batches == 1:
        nisa.tensor_tensor(
            dst=unpacked[:, :, 0].reshape_dim(3, (count, each)),
            data1=packed[:, :, 0].expand_dim(4).broadcast(4, each),
            data2=every.broadcast(2, heads).broadcast(3, count),
            op=nl.bitwise_and,
        )
        return unpacked.view(nl.uint8)[:, :, :, :, 0:tokens]
    for i in range(count):
        nisa.tensor_tensor(
            dst=unpacked[:, :, :, :, nl.ds(i * each, each)],
            data1=packed[:, :, :, :, i : i + 1].broadcast(4, each),
            data2=every.broadcast(2, batches).broadcast(3, heads),
            op=nl.bitwise_and,
        )
    return unpacked.view(nl.uint8)[:, :, :, :, 0:tokens]


def load_dense(
    dense: Any,
    batches: int,
    dtype: Any,
    beyond: float,
    place: Place,
    tile: KeyTile,
    group: RowGroup,
    plan: KernelPlan,
) -> Any:
    """A dense mask or bias of a tile: `[128, columns, b, heads or 1, ...]`; `beyond` its keys.

    b are the `batches` of the group, or 1 where they share numbers.
    """
    together = dense.shape[2]
    heads = group.kv_heads * group.queries if dense.shape[3] > 1 else 1
    first = group.first_kv * plan.group + group.first_query if dense.shape[3] > 1 else 0
    tokens = dense.shape[4]
    columns = tile.cached_columns
    loaded = nl.ndarray((PARTITIONS, columns, batches, heads, tokens), dtype, buffer=nl.sbuf)
    apart, by_batch = 1, loaded.expand_dim(1)
    if together < batches:
        shape = (PARTITIONS, batches, columns, heads, tokens)
        apart, loaded = batches, nl.ndarray(shape, dtype, buffer=nl.sbuf)
        by_batch, loaded = loaded.expand_dim(3), loaded.permute((0, 2, 1, 3, 4))
    for piece in tile.cached:
        p, part = piece.partitions, nl.ds(piece.column, piece.subtiles)
        slots = nl.ds(place.first_slot + piece.start, piece.keys)
        if p < PARTITIONS:
            nisa.memset(dst=loaded[:, part], value=beyond)
        for b in range(apart):
            number = (group.first_batch + b) * dense.shape[0] // plan.batch
            mine = dense[number, slots, :, nl.ds(first, heads)]
            by_key = mine.reshape_dim(0, (p, piece.subtiles))
            nisa.dma_copy(dst=by_batch[0:p, b, part], src=by_key)
    return loaded


def find_unseen(hidden: Any, group: RowGroup) -> Any:
    """Which keys no row of a pair sees, from `[128, columns, b, heads or 1, T]`."""
    columns, heads = hidden.shape[1], hidden.shape[3]
    if heads == 1:
        unseen = hidden[:, :, :, 0, 0]
        if hidden.shape[4] > 1:
            unseen = nl.ndarray((PARTITIONS, columns, group.batches), nl.uint8, buffer=nl.sbuf)
            nisa.tensor_reduce(dst=unseen, op=nl.minimum, data=hidden[:, :, :, 0, :], axis=3)
        by_head = unseen.expand_dim(3).broadcast(3, group.kv_heads)
        found = nl.ndarray((PARTITIONS, columns, group.pairs), nl.uint8, buffer=nl.sbuf)
        by_pair = found.reshape_dim(2, (group.batches, group.kv_heads))
        nisa.tensor_copy(dst=by_pair, src=by_head)
        return found
    found = nl.ndarray((PARTITIONS, columns, group.pairs), nl.uint8, buffer=nl.sbuf)
    rows = hidden.flatten_dims(2, 4).reshape_dim(2, (group.pairs, group.rows_per_pair))
    nisa.tensor_reduce(dst=found, op=nl.minimum, data=rows, axis=3)
    return found


def mask_new(
    logits: Logits,
    inputs: Inputs,
    consts: Constants,
    tile: KeyTile,
    group: RowGroup,
    plan: KernelPlan,
) -> None:
    """Adds the bias of new keys, and masks those that a row may not see."""
    for piece in tile.new:
        live = partitions_of(piece, group, plan)
        bank = logits.banks[piece.column // logits.per_bank]
        part = bank[0:live, piece.column % logits.per_bank, :]
        if plan.new_pairs > 0:
            mask_other_pairs(part, inputs, consts, group, plan)
            continue
        if plan.features.has_bias:
            bias = load_for_rows(inputs.new_bias, piece, group, plan)
            nisa.tensor_tensor(dst=part, data1=part, data2=bias, op=nl.add)
        hidden = load_new_hidden(inputs, consts, piece, group, plan)
        rows = part.reshape_dim(1, hidden.shape[1:4])
        nisa.tensor_copy_predicated(dst=rows, src=MASKED, predicate=hidden)


def mask_other_pairs(
    part: Any, inputs: Inputs, consts: Constants, group: RowGroup, plan: KernelPlan
) -> None:
    """The same for logits `[pairs, R]` of all new keys and all rows: rows see those of their pair.

    So what is said of a key's own rows may be added to all.
    """
    rows = part.reshape_dim(1, (group.pairs, group.rows_per_pair))
    if plan.features.has_bias:
        bias = load_for_pairs(inputs.new_bias, group, plan)
        every = bias.expand_dim(1).broadcast(1, group.pairs)
        nisa.tensor_tensor(dst=rows, data1=rows, data2=every, op=nl.add)
    mine = inputs.new_hidden[
        nl.ds(group.first_batch, group.batches), nl.ds(group.first_kv, group.kv_heads)
    ]
    packed = nl.ndarray((group.pairs, mine.shape[2], mine.shape[3]), nl.uint8, buffer=nl.sbuf)
    in_loop = plan.live != None  # noqa: E711  (whose keys come after these)
    load_small(packed, mine, in_loop, plan)
    if plan.new_pairs > BITS:
        words = packed.view(nl.uint16).expand_dim(1).expand_dim(1)
        packed = unpack_tokens(words, consts.bits, plan.new_pairs)[:, 0, 0]
    hidden = packed.permute((0, 2, 1))[:, 0 : group.pairs]
    if hidden.shape[2] < group.rows_per_pair:
        hidden = hidden.broadcast(2, group.rows_per_pair)
    nisa.tensor_copy_predicated(dst=rows, src=MASKED, predicate=hidden)


def load_new_hidden(
    inputs: Inputs, consts: Constants, piece: Piece, group: RowGroup, plan: KernelPlan
) -> Any:
    """Which new keys are hidden, `[keys, b, heads, T]`; all heads see alike or each has its own."""
    heads, every = group.kv_heads * group.queries, inputs.new_hidden.shape[2]
    first = group.first_kv * plan.group + group.first_query if every > 1 else 0
    mine = inputs.new_hidden[
        nl.ds(piece.start, piece.keys),
        nl.ds(group.first_batch, group.batches),
        nl.ds(first, heads if every > 1 else 1),
    ]
    packed = nl.ndarray(mine.shape, nl.uint8, buffer=nl.sbuf)
    in_loop = plan.live != None  # noqa: E711  (whose keys come after these)
    load_small(packed, mine, in_loop, plan)
    hidden = unpack_tokens(packed.expand_dim(1), consts.bits, group.tokens)[:, 0]
    return hidden.broadcast(2, heads) if every == 1 else hidden


def add_bias(
    logits: Logits, inputs: Inputs, place: Place, tile: KeyTile, group: RowGroup, plan: KernelPlan
) -> None:
    """Adds the dense bias to the logits of cached keys."""
    if not plan.features.has_bias or not tile.cached:
        return
    bias = load_dense(inputs.bias, group.batches, nl.float32, 0.0, place, tile, group, plan)
    heads = bias.shape[3]
    if bias.shape[4] < group.tokens:
        bias = bias.broadcast(4, group.tokens)
    for piece in tile.cached:
        for span in spans_of(piece, logits):
            p = piece.partitions
            mine = bias[0:p, nl.ds(piece.column + span[3], span[2])]
            part = logits.banks[span[0]][0:p, nl.ds(span[1], span[2]), :]
            part = part.reshape_dim(
                2, (group.batches, group.kv_heads * group.queries, group.tokens)
            )
            if heads == 1:
                mine = mine.broadcast(3, part.shape[3])
            nisa.tensor_tensor(dst=part, data1=part, data2=mine, op=nl.add)
