"""The mLSTM in Pallas: kernels for whole sequences, forward and backward, on GPUs.

The stages and names are those of backends/kernels/mlstm/inter_chunk.py. Here XLA does what is done
with vectors (running sums of the gates, m at the borders, weights, gate gradients; mlstm.py), and
sequences come padded: whole chunks, head dimensions that are powers of two. So no kernel masks.

Each kernel is a function of its sizes (`s`) and arrays. Its grid is (programs of a head, H, B), so
that no program divides by anything but a power of two: where the number of chunks was divided by,
and was 3 or 7, XLA's Triton (jax 0.11.2, H200) compiled `attend` into a race. Shapes: q, k, v, h
(B, T, H, D); vectors (B * H, NC, LC) in float32; states (B * H, NC, K, V).
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from keras_xlstm.backends.jax.pallas.launch import div, dot, launch, loop, output, place, rem
from keras_xlstm.backends.log_space import NEVER

_BLOCK = 512  # elements of a state that one program of `borders` carries
_AHEAD = 8  # chunks that it loads at a time
_SUMS = 16  # rows that n is kept in: its sum over steps would pass between warps at each


def chunk_states(s, x, z, w, through, rho, first, forward, tiles, serial):
    """S = sum_t w_t x_t z_t^T and n = sum_t w_t (rho_t) x_t, at every chunk border.

    Forward (`rho` None) w_t is the weight of step t in the state at its chunk's end: slot c of the
    result is the state that enters chunk c, slot NC the last. In reverse w_t is that of the state
    that enters the chunk, at t. S is then the gradient of the state that leaves it, over `scale`.
    `inner` is its product with that state, in parts. `first`: {} or S0, n0; `forward`: None or F,
    F_n, all states and normalisers of the forward pass.

    Returns a dict: S, n, S_last, n_last (float32); in reverse inner.
    """
    return (_serial if serial else _parallel)(s, x, z, w, through, rho, first, forward, tiles)


def _sums(s, tiles, w, rho, x, z, dtype):
    """The function (reference tiles of a block of L steps) -> what it adds to S (turned) and n."""
    L, BX = tiles["L"], tiles["BX"]

    def add(S, n, bh, b, head, c, block, cx, cz):
        rows, steps = pl.ds(block * L, L), pl.ds(c * s.LC + block * L, L)
        weights = w[bh, c, rows]
        # S is turned, so that what is computed is the second operand of the tensor cores.
        xw = x[b, steps, head, cx].astype(jnp.float32) * weights[:, None]  # [L, BX]
        zs = z[b, steps, head, cz]  # [L, BZ]
        S += dot(zs.astype(dtype), xw.astype(dtype), (0, 0), s.precision)
        if rho is not None:
            xw *= rho[bh, c, rows][:, None]
        return S, n + jnp.sum(jnp.reshape(xw, (L // _SUMS, _SUMS, BX)), 0)

    return add


def _serial(s, x, z, w, through, rho, first, forward, tiles):
    """One program takes its tile through all chunks: for many heads."""
    reverse = rho is not None
    K, V = x.shape[-1], z.shape[-1]
    L, BX, BZ = tiles["L"], tiles["BX"], tiles["BZ"]
    steps, slots = s.LC // L, s.NC + (not reverse)
    NX, NZ = K // BX, V // BZ
    dtype = s.state_dtype

    def kernel(x, z, w, through, S, n, S_last, n_last, rho=None, S0=None, n0=None, **given):
        jx, jz, b, head, bh = place(s, NX)
        cx, cz = pl.ds(jx * BX, BX), pl.ds(jz * BZ, BZ)
        add = _sums(s, tiles, w, rho, x, z, dtype)

        def put(slot, state, sums):
            S[bh, slot, cx, cz] = state.T.astype(dtype)
            n[bh, slot, cx] = jnp.sum(sums, 0)  # the same for all jz

        def border(c, state, sums):
            if reverse:
                F = given["F"][bh, c + 1, cx, cz].T.astype(jnp.float32)
                F_n = given["F_n"][bh, c + 1, cx]
                product = jnp.where(jz == 0, jnp.sum(sums * F_n[None, :]), 0.0)
                given["inner"][bh, c, jx + NX * jz] = product + jnp.sum(F * state)
            put(c, state, sums)
            left = through[bh, c]
            return state * left, sums * left

        def step(t, carry):
            c, block = div(t, steps), rem(t, steps)
            c = jnp.int32(s.NC - 1) - c if reverse else c
            carry = lax.cond(block == 0, functools.partial(border, c), lambda *a: a, *carry)
            return add(*carry, bh, b, head, c, block, cx, cz)

        state, sums = jnp.zeros((BZ, BX), jnp.float32), jnp.zeros((_SUMS, BX), jnp.float32)
        if S0 is not None:
            state = S0[bh, cx, cz].T
            only = (lax.iota(jnp.int32, _SUMS) == 0)[:, None]
            sums = jnp.where(only, n0[bh, cx][None, :], sums)
        state, sums = loop(0, s.NC * steps, step, (state, sums))
        S_last[bh, cx, cz] = state.T
        n_last[bh, cx] = jnp.sum(sums, 0)
        if not reverse:
            put(s.NC, state, sums)

    outputs = {
        "S": output((s.BH, slots, K, V), dtype), "n": output((s.BH, slots, K)),
        "S_last": output((s.BH, K, V)), "n_last": output((s.BH, K)),
    }  # fmt: skip
    inputs = {"x": x, "z": z, "w": w, "through": through, "rho": rho, **first}
    if reverse:
        inputs |= forward
        outputs["inner"] = output((s.BH, s.NC, NX * NZ))
    options = {k: tiles[k] for k in ("num_warps", "num_stages")}
    return launch(
        kernel, inputs, outputs, (NX * NZ, s.H, s.B), "mlstm_states", s.interpret, **options
    )  # fmt: skip


def _parallel(s, x, z, w, through, rho, first, forward, tiles):
    """One program a chunk writes what it adds, and another kernel goes along the borders: for few
    heads, whose serial programs would leave the device idle."""
    reverse = rho is not None
    K, V = x.shape[-1], z.shape[-1]
    L, BX, BZ = tiles["L"], tiles["BX"], tiles["BZ"]
    NX, NZ, slots = K // BX, V // BZ, s.NC + (not reverse)
    dtype = s.state_dtype

    def kernel(x, z, w, S, n, rho=None):
        jx, jz, c, b, head, bh = place(s, NX, NZ)
        cx, cz = pl.ds(jx * BX, BX), pl.ds(jz * BZ, BZ)
        add = _sums(s, tiles, w, rho, x, z, dtype)
        carry = jnp.zeros((BZ, BX), jnp.float32), jnp.zeros((_SUMS, BX), jnp.float32)
        state, sums = loop(
            0, s.LC // L, lambda t, carry: add(*carry, bh, b, head, c, t, cx, cz), carry
        )
        S[bh, c, cx, cz] = state.T.astype(dtype)
        n[bh, c, cx] = jnp.sum(sums, 0)

    added = launch(
        kernel, {"x": x, "z": z, "w": w, "rho": rho},
        {"S": output((s.BH, slots, K, V), dtype), "n": output((s.BH, slots, K))},
        (NX * NZ * s.NC, s.H, s.B), "mlstm_chunks", s.interpret,
        num_warps=tiles["num_warps"], num_stages=tiles["num_stages"],
    )  # fmt: skip
    results = {}
    for name, size in (("S", K * V), ("n", K)):
        flat = jnp.reshape(added[name], (s.BH, slots, size))
        start = first.get(f"{name}0")
        start = None if start is None else jnp.reshape(start, (s.BH, size))
        F = forward["F" if name == "S" else "F_n"] if reverse else None
        F = None if F is None else jnp.reshape(F, (s.BH, s.NC + 1, size))
        got = _borders(s, flat, start, through, F)
        results[name] = jnp.reshape(got["p"], added[name].shape)
        results[f"{name}_last"] = jnp.reshape(got["last"], (s.BH, *added[name].shape[2:]))
        if reverse:
            results[f"inner_{name}"] = got["inner"]
    if reverse:
        parts = results.pop("inner_S"), results.pop("inner_n")
        results["inner"] = jnp.concatenate(parts, -1)
    return results


def _borders(s, added, first, through, forward):
    """In place, what chunks add becomes the state that enters each, and slot NC the last state; in
    reverse the gradient of the state that leaves each, and its products with that state."""
    size = added.shape[-1]
    block = min(_BLOCK, size)
    reverse = forward is not None

    def kernel(added, through, p, last, first=None, forward=None, inner=None):
        tile, _, _, bh = place(s)
        o = pl.ds(tile * block, block)

        def several(start, count, state):
            """All loads first: each would wait for memory, and the loop is not pipelined."""
            chunks = [s.NC - 1 - start - j if reverse else start + j for j in range(count)]
            more = [added[bh, c, o].astype(jnp.float32) for c in chunks]
            if reverse:
                states = [forward[bh, c + 1, o].astype(jnp.float32) for c in chunks]
            for j, c in enumerate(chunks):
                if reverse:
                    inner[bh, c, tile] = jnp.sum(states[j] * state)
                p[bh, c, o] = state.astype(p.dtype)
                state = through[bh, c] * state + more[j]
            return state

        state = jnp.zeros((block,), jnp.float32) if first is None else first[bh, o]
        whole = s.NC // _AHEAD
        state = loop(0, whole, lambda t, a: several(t * _AHEAD, _AHEAD, a), state)
        if s.NC % _AHEAD:
            state = several(whole * _AHEAD, s.NC % _AHEAD, state)
        last[bh, o] = state
        if not reverse:
            p[bh, s.NC, o] = state.astype(p.dtype)

    outputs = {"p": output(added.shape, added.dtype), "last": output((s.BH, size))}
    if reverse:
        outputs["inner"] = output((s.BH, s.NC, size // block))
    inputs = {"added": added, "through": through, "first": first, "forward": forward}
    return launch(
        kernel, inputs, outputs, (size // block, s.H, s.B), "mlstm_borders", s.interpret,
        aliases={0: 0}, num_warps=2,
    )  # fmt: skip


def step(q, k, v, i, log_f, C, n, m, eps, scale, tiles, interpret):
    """Eqs. 19-27 for one step: q, k (B, H, K), v (B, H, V), i, log_f (B, H); C, n, m in place.

    Returns a dict: h (B, H, V), C_out, n_out, m_out. Two kernels, as several programs share a head:
    they could not read n and m while one of them writes, and copies would take longer.
    """
    B, H, K, V = C.shape
    shared = {"q": q, "k": k}
    gates = _step_gates({"n": n, "m": m, "i": i, "log_f": log_f, **shared}, eps, scale, interpret)
    weights = {name: gates.pop(name) for name in ("keep", "add", "d")}
    BK, BV, warps = tiles

    def kernel(C, q, k, v, keep, add, d, C_out, h):
        part, head, b = (pl.program_id(axis) for axis in range(3))
        cv = pl.ds(part * BV, BV)
        places = [pl.ds(start, BK) for start in range(0, K, BK)]
        coming = [C[b, head, ck, cv] for ck in places[:2]]  # loads ahead of what waits for them
        keep, add = keep[b, head], add[b, head]
        values = v[b, head, cv].astype(jnp.float32)
        sums = jnp.zeros((BK, BV), jnp.float32)
        for index, ck in enumerate(places):
            qs = q[b, head, ck].astype(jnp.float32) * scale
            ks = k[b, head, ck].astype(jnp.float32) * add
            old = coming.pop(0)
            coming += [C[b, head, later, cv] for later in places[index + 2 : index + 3]]
            new = jnp.where(old == 0.0, 0.0, keep * old) + ks[:, None] * values[None, :]
            C_out[b, head, ck, cv] = new
            sums += qs[:, None] * new
        h[b, head, cv] = (jnp.sum(sums, 0) / d[b, head]).astype(h.dtype)

    outputs = {"C_out": output(C.shape), "h": output((B, H, V), v.dtype)}
    got = launch(
        kernel, {"C": C, **shared, "v": v, **weights}, outputs, (V // BV, H, B), "mlstm_step",
        interpret, aliases={0: 0}, num_warps=warps,
    )  # fmt: skip
    return got | gates


def _step_gates(inputs, eps, scale, interpret):
    """n, m after the step, in place; what is kept and added of C, and what h is divided by."""
    B, H, _ = inputs["n"].shape

    def kernel(n, m, i, log_f, q, k, n_out, m_out, keep, add, d):
        head, b = (pl.program_id(axis) for axis in range(2))
        old, old_m = n[b, head, :], m[b, head]
        i, log_f = i[b, head], log_f[b, head]
        # The official zero state is a fresh start: nothing there to weigh against i.
        fresh = (old_m == 0.0) & (jnp.max(jnp.abs(old)) == 0.0)
        new_m = jnp.where(fresh, i, jnp.maximum(log_f + old_m, i))
        kept, added = jnp.exp((old_m - new_m) + log_f), jnp.exp(i - new_m)
        new = jnp.where(old == 0.0, 0.0, kept * old) + added * k[b, head, :].astype(jnp.float32)
        r = jnp.sum(q[b, head, :].astype(jnp.float32) * scale * new)
        floor = jnp.exp(jnp.where(new_m > -80.0, -new_m, 80.0))
        n_out[b, head, :] = new
        m_out[b, head] = jnp.where(new_m <= NEVER / 2, 0.0, new_m)
        keep[b, head], add[b, head] = kept, added
        d[b, head] = jnp.maximum(jnp.abs(r), floor) + eps

    outputs = {"n_out": output(inputs["n"].shape)}
    outputs |= {name: output((B, H)) for name in ("m_out", "keep", "add", "d")}
    return launch(
        kernel, inputs, outputs, (H, B), "mlstm_step_gates", interpret, aliases={0: 0, 1: 1},
        num_warps=2,
    )  # fmt: skip
