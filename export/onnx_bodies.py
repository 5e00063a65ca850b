"""Function bodies of the node `gdn2::GatedDeltaNet2` in standard ONNX operators, so that any runtime can run the file.

    scan                one token an iteration, equation (1): the smallest
    chunk               up to 16 tokens an iteration, equations (3)-(8) with pairwise decays: no exponent is positive
    linear_attention    ONNX Runtime's contrib LinearAttention in other coordinates (docs/derivation.md, Change of
                        coordinates), native speed in stock ONNX Runtime from 1.26 on, and nowhere else. b counts as at
                        least 1e-12
    none                no body: for TensorRT before 10.7, whose parser would take a body where the plugin is meant

All compute in float32 whatever the node's types and take any T >= 1 and any number of heads. What writes the last state
depends on everything that reads the first one, so that a caller may bind past and present to one buffer. Equation
numbers: docs/derivation.md. Names of values end in their axes where they have some; C is the tokens of a chunk, P the
pairs of two of them, and W = V HV / H, value groups being wider values (2).
"""

from __future__ import annotations

from itertools import pairwise

import onnx

from gdn2_ops.export.onnx_schema import DOMAIN, INPUTS, OP, OPSET, OUTPUTS

NONE = "none"
LONGEST = 16  # tokens of a chunk; fewer of them are one chunk of their number
_SIZES = (1, 2, 4, 8)
CONTRIB = "com.microsoft"
_FLOAT, _DOUBLE = (f"<to = {x}>" for x in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE))


def function_body(kind: str, opset: int = OPSET) -> onnx.FunctionProto:
    """The body of that kind as a model-local function. Raises: ValueError: there is none of that name.

    opset: of the model that holds it.
    """
    if kind not in BODIES:
        raise ValueError(f"expected a body in {sorted([*BODIES, NONE])}, got {kind!r}")
    return _function(_OPEN + BODIES[kind] + _CLOSE, opset, f"Gated DeltaNet-2 in standard operators, body '{kind}'.")


def float64_body(opset: int = OPSET) -> onnx.FunctionProto:
    """The body scan in float64 between the node's types: what the others are compared with."""
    text = (_OPEN + _SCAN + _CLOSE).replace(_FLOAT, _DOUBLE)
    return _function(text, opset, "Gated DeltaNet-2 in standard operators, in float64.")


def with_body(model: onnx.ModelProto, body: onnx.FunctionProto) -> onnx.ModelProto:
    """A copy of the model whose nodes have that body in place of theirs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    others = [f for f in copy.functions if (f.domain, f.name) != (DOMAIN, OP)]
    del copy.functions[:]
    copy.functions.extend([*others, body])
    known = {x.domain for x in copy.opset_import}
    copy.opset_import.extend(x for x in body.opset_import if x.domain not in known)
    return copy


def _function(text: str, opset: int, doc: str) -> onnx.FunctionProto:
    contrib = f', "{CONTRIB}" : 1' if CONTRIB in text else ""
    function = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}{contrib}]>\n'
        f"{OP} <scale, plugin_namespace, plugin_version> ({', '.join(INPUTS)}) => ({', '.join(OUTPUTS)})\n{{{text}}}"
    )
    function.doc_string = doc
    return function


# Casts to float32; q scaled; bk = b*k, wv = w*v; values [B, T, H, W]; S0 [B, H, K, W].
_OPEN = """
    scale_value = Constant <value_float : float = @scale> ()
    scale_ = Cast <to = 1> (scale_value)
    q_f = Cast <to = 1> (q)
    k_f = Cast <to = 1> (k)
    v_f = Cast <to = 1> (v)
    g_f = Cast <to = 1> (g)
    b_f = Cast <to = 1> (b)
    w_f = Cast <to = 1> (w)
    H = Shape <start = 2, end = 3> (q)
    K = Shape <start = 3, end = 4> (q)
    V = Shape <start = 3, end = 4> (v)
    keep_1 = Constant <value = int64[1] {0}> ()
    keep_2 = Constant <value = int64[2] {0, 0}> ()
    keep_3 = Constant <value = int64[3] {0, 0, 0}> ()
    rest = Constant <value = int64[1] {-1}> ()
    wide = Concat <axis = 0> (keep_2, H, rest)
    qs = Mul (q_f, scale_)
    bk = Mul (b_f, k_f)
    wv_BTHV = Mul (w_f, v_f)
    wv = Reshape (wv_BTHV, wide)
    S0_f = Cast <to = 1> (initial_state)
    grouped = Concat <axis = 0> (keep_1, H, rest, K, V)
    S0_BHGKV = Reshape (S0_f, grouped)
    S0_BHKGV = Transpose <perm = [0, 1, 3, 2, 4]> (S0_BHGKV)
    wide_state = Concat <axis = 0> (keep_3, rest)
    S0 = Reshape (S0_BHKGV, wide_state)
"""

# From o_BTHW and S_last [B, H, K, W] back to value heads and the types of the node.
_CLOSE = """
    values = Shape (v)
    o_f = Reshape (o_BTHW, values)
    o = CastLike (o_f, q)
    ungrouped = Concat <axis = 0> (keep_3, rest, V)
    S_BHKGV = Reshape (S_last, ungrouped)
    S_BHGKV = Transpose <perm = [0, 1, 3, 2, 4]> (S_BHKGV)
    states = Shape (initial_state)
    final_f = Reshape (S_BHGKV, states)
    final_state = CastLike (final_f, initial_state)
"""

_SCAN = """
    column = Constant <value = int64[1] {-1}> ()
    row = Constant <value = int64[1] {-2}> ()
    q_TBHK = Transpose <perm = [1, 0, 2, 3]> (qs)
    k_TBHK = Transpose <perm = [1, 0, 2, 3]> (k_f)
    bk_TBHK = Transpose <perm = [1, 0, 2, 3]> (bk)
    g_TBHK = Transpose <perm = [1, 0, 2, 3]> (g_f)
    wv_TBHW = Transpose <perm = [1, 0, 2, 3]> (wv)
    S_last, o_TBHW = Scan <num_scan_inputs = 5, body = token (S, q_t, k_t, bk_t, g_t, wv_t) => (S_next, o_t) {
        decay = Exp (g_t)
        decay_K1 = Unsqueeze (decay, column)
        D = Mul (decay_K1, S)
        bk_1K = Unsqueeze (bk_t, row)
        r_1W = MatMul (bk_1K, D)
        wv_1W = Unsqueeze (wv_t, row)
        u_1W = Sub (wv_1W, r_1W)
        k_K1 = Unsqueeze (k_t, column)
        ku = Mul (k_K1, u_1W)
        S_next = Add (D, ku)
        q_1K = Unsqueeze (q_t, row)
        o_1W = MatMul (q_1K, S_next)
        o_t = Squeeze (o_1W, row)
    }> (S0, q_TBHK, k_TBHK, bk_TBHK, g_TBHK, wv_TBHW)
    o_BTHW = Transpose <perm = [1, 0, 2, 3]> (o_TBHW)
"""


def _masks() -> str:
    """below_1 ... below_8 [C, C]: the entries that join two diagonal blocks of that size to one of twice the size."""
    lines, rows = [], range(LONGEST)
    for size in _SIZES:
        entries = [int(i // (2 * size) == j // (2 * size) and i // size > j // size) for i in rows for j in rows]
        values = f"float[{LONGEST}, {LONGEST}] {{{', '.join(map(str, entries))}}}"
        lines.append(f"    whole_{size} = Constant <value = {values}> ()")
        lines.append(f"    below_{size} = Slice (whole_{size}, keep_2, square, both)")
    return "\n".join(lines)


def _inverse() -> str:
    """(I + T)^-1 by the block formula, doubling the block: stable, where the product of powers of T is not (6)."""
    lines = ["        T_1 = Mul (T, below_1)", "        X_1 = Sub (eye, T_1)"]
    for known, size in pairwise(_SIZES):
        lines.append(f"        T_{size} = Mul (T, below_{size})")
        lines.append(f"        TX_{size} = MatMul (T_{size}, X_{known})")
        lines.append(f"        XTX_{size} = MatMul (X_{known}, TX_{size})")
        lines.append(f"        X_{size} = Sub (X_{known}, XTX_{size})")
    return "\n".join(lines)


# Tokens past the end are padding: g = b = w = 0 leaves the state alone. Chunks lead: [N, B, H, C, K].
_CHUNKS = "".join(
    f"""
    {name}_padded = Pad ({source}, pads)
    {name}_BNCHD = Reshape ({name}_padded, {shape})
    {name}_chunks = Transpose <perm = [1, 0, 3, 2, 4]> ({name}_BNCHD)
"""
    for name, source, shape in (
        ("q", "qs", "key_chunks"),
        ("k", "k_f", "key_chunks"),
        ("bk", "bk", "key_chunks"),
        ("g", "g_f", "key_chunks"),
        ("wv", "wv", "value_chunks"),
    )
)

_CHUNK = (
    f"""
    longest = Constant <value = int64[1] {{{LONGEST}}}> ()
    T_ = Shape <start = 1, end = 2> (q)
    C = Min (T_, longest)
    negative = Neg (T_)
    missing = Mod (negative, C)
    zeros_5 = Constant <value = int64[5] {{0, 0, 0, 0, 0}}> ()
    pads = Concat <axis = 0> (zeros_5, missing, keep_2)
    W = Shape <start = 3, end = 4> (wv)
    key_chunks = Concat <axis = 0> (keep_1, rest, C, H, K)
    value_chunks = Concat <axis = 0> (keep_1, rest, C, H, W)
    square = Concat <axis = 0> (C, C)
    both = Constant <value = int64[2] {{0, 1}}> ()
    ones = ConstantOfShape <value = float[1] {{1}}> (square)
    upto = Trilu <upper = 0> (ones)
    after = Sub (ones, upto)
    strictly = Constant <value_int = -1> ()
    before = Trilu <upper = 0> (ones, strictly)
    eye = Sub (upto, before)
    row = Constant <value = int64[1] {{1}}> ()
    column = Constant <value = int64[1] {{0}}> ()
    upto_C1C = Unsqueeze (upto, row)
    after_1CC = Unsqueeze (after, column)
    between_CCC = Mul (upto_C1C, after_1CC)
    flat_pairs = Concat <axis = 0> (rest, C)
    between = Reshape (between_CCC, flat_pairs)
    pairs = Concat <axis = 0> (keep_2, C, C, rest)
"""
    + _masks()
    + _CHUNKS
    + """
    S_last, o_NBHCW = Scan <num_scan_inputs = 5, body = chunk (S, q_c, k_c, bk_c, g_c, wv_c) => (S_next, o_c) {
        axis_C = Constant <value_int = 2> ()
        columns = Constant <value = int64[1] {2}> ()
        last = Constant <value = int64[1] {-1}> ()
        G = CumSum (g_c, axis_C)
        span_PK = MatMul (between, g_c)
        span = Reshape (span_PK, pairs)
        decay_CCK = Exp (span)
        k_j = Unsqueeze (k_c, columns)
        decayed_k_CCK = Mul (decay_CCK, k_j)
        bk_K1 = Unsqueeze (bk_c, last)
        q_K1 = Unsqueeze (q_c, last)
        against_K2 = Concat <axis = -1> (bk_K1, q_K1)
        scores_CC2 = MatMul (decayed_k_CCK, against_K2)
        T_CC1, A_CC1 = Split <axis = -1, num_outputs = 2> (scores_CC2)
        T_all = Squeeze (T_CC1, last)
        A_all = Squeeze (A_CC1, last)
        T = Trilu <upper = 0> (T_all, strictly)
        Aqk = Trilu <upper = 0> (A_all)
"""
    + _inverse()
    + """
        gamma = Exp (G)
        E = Mul (gamma, bk_c)
        gamma_q = Mul (gamma, q_c)
        reading = Concat <axis = 2> (E, gamma_q)
        read = MatMul (reading, S)
        ES, o_state = Split <axis = 2, num_outputs = 2> (read)
        X = Sub (wv_c, ES)
        R = MatMul (X_8, X)
        o_local = MatMul (Aqk, R)
        o_c = Add (o_state, o_local)
        end = Constant <value_int = -1> ()
        tail_k = Gather <axis = 2> (decayed_k_CCK, end)
        tail_k_KC = Transpose <perm = [0, 1, 3, 2]> (tail_k)
        written = MatMul (tail_k_KC, R)
        gamma_last = Gather <axis = 2> (gamma, last)
        gamma_last_K1 = Transpose <perm = [0, 1, 3, 2]> (gamma_last)
        kept = Mul (gamma_last_K1, S)
        S_next = Add (kept, written)
    }> (S0, q_chunks, k_chunks, bk_chunks, g_chunks, wv_chunks)
    o_BNCHW = Transpose <perm = [1, 0, 3, 2, 4]> (o_NBHCW)
    joined = Concat <axis = 0> (keep_1, rest, H, W)
    o_padded = Reshape (o_BNCHW, joined)
    first = Constant <value = int64[1] {0}> ()
    axis_T = Constant <value = int64[1] {1}> ()
    o_BTHW = Slice (o_padded, first, T_, axis_T)
"""
)

# S_t = Diag(b_t)^-1/2 R_t: b is clamped, for coordinates with b = 0 do not exist; its log starts from b_0 = 1.
# Each head is a row of the batch, N = B H: the operator's number of heads is an attribute, which a body cannot compute.
_LINEAR_ATTENTION = """
    least = Constant <value_float = 1e-12> ()
    half = Constant <value_float = 0.5> ()
    b_least = Max (b_f, least)
    root = Sqrt (b_least)
    log_b = Log (b_least)
    log_root = Mul (log_b, half)
    shift = Constant <value = int64[8] {0, 1, 0, 0, 0, -1, 0, 0}> ()
    log_root_before = Pad (log_root, shift)
    log_root_step = Sub (log_root, log_root_before)
    g_R = Add (g_f, log_root_step)
    k_R = Mul (root, k_f)
    q_R = Div (qs, root)
    T_ = Shape <start = 1, end = 2> (q)
    W = Shape <start = 3, end = 4> (wv)
    keys = Concat <axis = 0> (rest, T_, K)
    values_ = Concat <axis = 0> (rest, T_, W)
    q_BHTK = Transpose <perm = [0, 2, 1, 3]> (q_R)
    k_BHTK = Transpose <perm = [0, 2, 1, 3]> (k_R)
    g_BHTK = Transpose <perm = [0, 2, 1, 3]> (g_R)
    v_BHTW = Transpose <perm = [0, 2, 1, 3]> (wv)
    q_NTK = Reshape (q_BHTK, keys)
    k_NTK = Reshape (k_BHTK, keys)
    g_NTK = Reshape (g_BHTK, keys)
    v_NTW = Reshape (v_BHTW, values_)
    rows = Shape <start = 0, end = 2> (q_NTK)
    one = Constant <value = int64[1] {1}> ()
    beta_shape = Concat <axis = 0> (rows, one)
    beta = ConstantOfShape <value = float[1] {1.0}> (beta_shape)
    states_N1KW = Concat <axis = 0> (rest, one, K, W)
    R_first = Reshape (S0, states_N1KW)
    o_NTW, R_last_N1KW = com.microsoft.LinearAttention <q_num_heads = 1, kv_num_heads = 1, scale = 1.0,
        update_rule = "gated_delta"> (q_NTK, k_NTK, v_NTW, R_first, g_NTK, beta)
    batch = Shape <start = 0, end = 1> (q)
    o_shape = Concat <axis = 0> (batch, H, T_, W)
    o_BHTW = Reshape (o_NTW, o_shape)
    o_BTHW = Transpose <perm = [0, 2, 1, 3]> (o_BHTW)
    whole_states = Shape (S0)
    R_last = Reshape (R_last_N1KW, whole_states)
    last_token = Constant <value_int = -1> ()
    root_BHK = Gather <axis = 1> (root, last_token)
    root_BHK1 = Unsqueeze (root_BHK, rest)
    S_last = Div (R_last, root_BHK1)
"""

BODIES = {"scan": _SCAN, "chunk": _CHUNK, "linear_attention": _LINEAR_ATTENTION}
