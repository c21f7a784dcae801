"""sLSTM and mLSTM restated in float64 NumPy, one step at a time, forward and backward.

Written from the equations alone and sharing nothing with the package: masks skip a step, segment
changes empty the state, and gradients are plain reverse accumulation through the recurrence.
`tests/test_oracle.py` checks these gradients against finite differences. m is a constant in them.
"""

import numpy as np


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def _starts(mask, segment_ids, B, T):
    """Per row, the steps to run and whether each starts from an empty state."""
    for b in range(B):
        plan, current = [], None
        for t in range(T):
            if mask is not None and not mask[b, t]:
                continue
            new = None if segment_ids is None else segment_ids[b, t]
            plan.append((t, current is not None and new != current))
            current = new
        yield b, plan


def mlstm(
    q, k, v, i, f, state=None, mask=None, segment_ids=None, input_gate="exp", eps=1e-6,
    gradients=None,
):  # fmt: skip
    """Returns h and (C, n, m); with gradients=(dh, dC, dn) also a dict of gradients."""
    q, k, v, i, f = (np.asarray(a, np.float64) for a in (q, k, v, i, f))
    B, T, H, K = q.shape
    V = v.shape[-1]
    C0, n0, m0 = (
        (np.zeros((B, H, K, V)), np.zeros((B, H, K)), np.zeros((B, H)))
        if state is None
        else (np.array(s, np.float64) for s in state)
    )
    h = np.zeros((B, T, H, V))
    last = [a.copy() for a in (C0, n0, m0)]
    grad = {name: np.zeros_like(a) for name, a in zip("qkvif", (q, k, v, i, f), strict=True)}
    grad |= {"C": np.zeros_like(C0), "n": np.zeros_like(n0), "m": np.zeros_like(m0)}
    for b, plan in _starts(mask, segment_ids, B, T):
        for x in range(H):
            C, n, m = C0[b, x], n0[b, x], m0[b, x]
            fresh = not C.any() and not n.any()
            tape = []
            for t, starts in plan:
                if starts:
                    C, n, fresh = np.zeros_like(C), np.zeros_like(n), True
                log_i = -np.logaddexp(0, -i[b, t, x]) if input_gate == "sigmoid" else i[b, t, x]
                log_f = -np.logaddexp(0, -f[b, t, x])
                m_new = log_i if fresh else max(log_f + m, log_i)
                gate_f = 0.0 if fresh else np.exp(log_f + m - m_new)
                gate_i = np.exp(log_i - m_new)
                C_old, n_old = C, n
                C = gate_f * C + gate_i * np.outer(k[b, t, x], v[b, t, x])
                n = gate_f * n + gate_i * k[b, t, x]
                m, fresh = m_new, False
                query = q[b, t, x] / np.sqrt(K)
                r = query @ n
                with np.errstate(over="ignore"):
                    floor = np.exp(-m)
                d = max(abs(r), floor) + eps
                h[b, t, x] = query @ C / d
                tape.append((t, starts, C_old, n_old, gate_f, gate_i, C, n, r, floor, d))
            last[0][b, x], last[1][b, x], last[2][b, x] = C, n, m
            if gradients is None:
                continue
            dh, dC_last, dn_last = gradients
            dC, dn = dC_last[b, x].copy(), dn_last[b, x].copy()
            for t, starts, C_old, n_old, gate_f, gate_i, C, n, r, floor, d in reversed(tape):
                query, key, value = q[b, t, x] / np.sqrt(K), k[b, t, x], v[b, t, x]
                g = dh[b, t, x]
                dnum = g / d
                dr = -np.sign(r) * (g @ h[b, t, x]) / d if abs(r) > floor else 0.0
                grad["q"][b, t, x] = (C @ dnum + dr * n) / np.sqrt(K)
                dC = dC + np.outer(query, dnum)
                dn = dn + dr * query
                grad["k"][b, t, x] = gate_i * (dC @ value + dn)
                grad["v"][b, t, x] = gate_i * (dC.T @ key)
                slope_i = sigmoid(-i[b, t, x]) if input_gate == "sigmoid" else 1.0
                grad["i"][b, t, x] = gate_i * (key @ dC @ value + dn @ key) * slope_i
                slope_f = sigmoid(-f[b, t, x])
                grad["f"][b, t, x] = gate_f * ((C_old * dC).sum() + n_old @ dn) * slope_f
                dC, dn = gate_f * dC, gate_f * dn
                if starts:
                    dC, dn = np.zeros_like(dC), np.zeros_like(dn)
            grad["C"][b, x], grad["n"][b, x] = dC, dn
            grad["m"][b, x] = (dC * C0[b, x]).sum() + dn @ n0[b, x]
    return (h, tuple(last)) if gradients is None else (h, tuple(last), grad)


def slstm(
    x, R, bias=None, state=None, mask=None, segment_ids=None, forget_gate="sigmoid", clip=None,
    scale=None, gradients=None,
):  # fmt: skip
    """Returns h and (h, c, n, m); with gradients=(dh, dh_last, dc, dn) also a dict of gradients."""
    x, R = np.asarray(x, np.float64), np.asarray(R, np.float64)
    B, T, _, H, D = x.shape
    bias = np.zeros((4, H, D)) if bias is None else np.asarray(bias, np.float64)
    start = [np.zeros((B, H, D))] * 4 if state is None else state
    start = [np.array(s, np.float64) for s in start]
    scale = np.ones((B, H, D)) if scale is None else np.asarray(scale, np.float64)
    out = np.zeros((B, T, H, D))
    last = [s.copy() for s in start]
    grad = {"x": np.zeros_like(x), "R": np.zeros_like(R), "bias": np.zeros_like(bias)}
    grad |= {name: np.zeros((B, H, D)) for name in "hcnm"}
    for b, plan in _starts(mask, segment_ids, B, T):
        h, c, n, m = (s[b] for s in start)
        tape = []
        real = dict(plan)
        for t in range(T):
            if t not in real:
                out[b, t] = h
                continue
            if real[t]:
                h, c, n = np.zeros_like(h), np.zeros_like(c), np.zeros_like(n)
            h_in = h * scale[b]
            g = x[b, t] + bias + np.einsum("hd,hdge->ghe", h_in, R)
            log_f = -np.logaddexp(0, -g[1]) if forget_gate == "sigmoid" else g[1]
            slope = sigmoid(-g[1]) if forget_gate == "sigmoid" else 1.0
            fresh = n == 0
            m_new = np.where(fresh, g[0], np.maximum(log_f + m, g[0]))
            gate_f = np.where(fresh, 0.0, np.exp(np.where(fresh, 0.0, log_f + m - m_new)))
            gate_i = np.exp(g[0] - m_new)
            z, o = np.tanh(g[2]), sigmoid(g[3])
            c_old, n_old = c, n
            c, n, m = gate_f * c + gate_i * z, gate_f * n + gate_i, m_new
            h = o * c / n
            out[b, t] = h
            tape.append((t, h_in, c_old, n_old, gate_f, gate_i, slope, z, o, n, h))
        for s, value in zip(last, (h, c, n, m), strict=True):
            s[b] = value
        if gradients is None:
            continue
        dout, dh_last, dc_last, dn_last = gradients
        dh, dc, dn = dh_last[b].copy(), dc_last[b].copy(), dn_last[b].copy()
        tape = {entry[0]: entry for entry in tape}
        for t in reversed(range(T)):
            dh = dh + dout[b, t]
            if t not in tape:
                continue
            _, h_in, c_old, n_old, gate_f, gate_i, slope, z, o, n, h = tape[t]
            dc = dc + dh * o / n
            dn = dn - dh * h / n
            dg = np.stack([
                gate_i * (z * dc + dn),
                gate_f * (c_old * dc + n_old * dn) * slope,
                gate_i * dc * (1 - z**2),
                dh * h * (1 - o),
            ])  # fmt: skip
            grad["x"][b, t] = dg
            grad["bias"] += dg
            grad["R"] += np.einsum("hd,ghe->hdge", h_in, dg)
            dh = np.einsum("ghe,hdge->hd", dg, R) * scale[b]
            dh = dh if clip is None else np.clip(dh, -clip, clip)
            dc, dn = gate_f * dc, gate_f * dn
            if real[t]:
                dh, dc, dn = np.zeros_like(dh), np.zeros_like(dc), np.zeros_like(dn)
        grad["h"][b], grad["c"][b], grad["n"][b] = dh, dc, dn
        grad["m"][b] = dc * start[1][b] + dn * start[2][b]
    return (out, tuple(last)) if gradients is None else (out, tuple(last), grad)
