"""Reference of linear attention over all tokens of a clip, and of its gradients.

With a positive feature map phi (LiT, arXiv:2501.12976; SANA-Video, arXiv:2509.24695) and the rotary embedding R_i of
token i:

    S = sum_j R_j phi(k_j) v_j^T,   k' = sum_j phi(k_j),   o_i = (R_i phi(q_i))^T S / (phi(q_i) . k' + eps)

The numerator is rotated and the divisor is not, because rotated features may be negative and their sum may cross zero.
If all features of a query are zero, its result is 0. Attention is not causal, but the state (S, k') can be carried
from one chunk of a stream to the next. Optionally a depth-wise convolution of the values is added (LiT, guideline 1).

Shapes: B samples, N queries, M keys, H heads of D channels; a grid of T frames, h rows and w columns of tokens. Text
tokens may precede and follow the grid (joint attention). They are not rotated, and their convolution is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Options of linear attention. With the defaults it computes the formula above without rotation."""

    feature_map: str = "relu"
    """"relu", or "elu" for elu(x) + 1."""
    eps: float = 1e-15
    """Small number that is added to the divisor."""
    grid: tuple[int, int, int] | None = None
    """Frames, rows and columns of the video tokens; columns are the fastest axis."""
    text_first: int = 0
    """Number of text tokens before the video tokens. Text tokens are neither rotated nor convolved; needs `grid`."""
    text_last: int = 0
    """Number of text tokens after the video tokens; needs `grid`."""
    rope: Tensor | None = None
    """Rotary table from `rope_table`, (T + h + w, D / 2, 2); needs `grid` and `rope_pairs`."""
    rope_pairs: tuple[int, int, int] | None = None
    """Numbers of channel pairs that are rotated by the frame, the row and the column; they sum to D / 2."""
    qk_norm: str | None = None
    """None, "rms_norm" over the channels of a head, or "rms_norm_across_heads" (the names of diffusers)."""
    norm_eps: float = 1e-6
    """Small number that is added to the mean square."""
    query_weight: Tensor | None = None
    """Weight of the query norm, (D,), or (H * D,) across heads."""
    key_weight: Tensor | None = None
    """Weight of the key norm, (D,), or (H * D,) across heads."""
    conv_space: Tensor | None = None
    """Weights of a depth-wise convolution within each frame, (H * D, s, s) or (D, s, s), s odd; needs `grid`."""
    conv_time: Tensor | None = None
    """Weights of a depth-wise convolution along time, (H * D, s) or (D, s), s odd; the two are summed."""
    key_lengths: Tensor | None = None
    """Number of valid keys per sample, (B,), integers; later keys and values are ignored."""
    state: Tensor | None = None
    """Initial value of S, (B, H, D, D)."""
    key_sum: Tensor | None = None
    """Initial value of k', (B, H, D)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """Gradients of the inputs of `linear_attention`, except the norm weights. None for inputs that are None."""

    query: Tensor
    """Gradient of the query after its norm, like `key`; `rms_norm_backward` continues from it. With a norm it is not
    rounded to the dtype of the query."""
    key: Tensor
    value: Tensor
    conv_space: Tensor | None
    conv_time: Tensor | None
    state: Tensor
    """Gradient of S. The initial state and the sum over the keys have the same gradient."""
    key_sum: Tensor
    """Gradient of k'."""


def rope_table(frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pack the angles of a separable rotary embedding into the table of `Terms.rope`, (T + h + w, D / 2, 2).

    Args:
        frames: angles of the first channel pairs for each frame, (T, pairs).
        rows: angles of the next channel pairs for each row, (h, pairs).
        columns: angles of the last channel pairs for each column, (w, pairs).
    """
    axes = [frames, rows, columns]
    table = torch.zeros(sum(len(axis) for axis in axes), sum(axis.shape[1] for axis in axes), dtype=frames.dtype)
    position = pair = 0
    for axis in axes:
        table[position : position + len(axis), pair : pair + axis.shape[1]] = axis.cpu()
        position, pair = position + len(axis), pair + axis.shape[1]
    return torch.stack((table.cos(), table.sin()), dim=-1).float().to(frames.device)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result (B, N, H, D), and the state S (B, H, D, D) and k' (B, H, D) in float32 or float64.

    Args:
        query: (B, N, H, D).
        key: (B, M, H, D).
        value: (B, M, H, D).
        terms: the options.
    """
    q = feature(rms_norm(exact(query), terms.query_weight, terms), terms.feature_map)
    k, v = _existing_features(key, value, terms)
    state = torch.einsum("bmhd,bmhe->bhde", rotate(k, terms), v)
    key_sum = k.sum(dim=1)
    if terms.state is not None and terms.key_sum is not None:
        state, key_sum = state + terms.state.to(state.dtype), key_sum + terms.key_sum.to(state.dtype)
    divisor = torch.einsum("bnhd,bhd->bnh", q, key_sum) + terms.eps
    out = torch.einsum("bnhd,bhde->bnhe", rotate(q, terms), state) / divisor[..., None]
    if terms.conv_space is not None or terms.conv_time is not None:
        out = out + convolve(v, terms)
    return out.to(query.dtype), state, key_sum


def linear_attention_backward(
    gradient: Tensor,
    of_state: Tensor | None,
    of_key_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    key_sum: Tensor,
    terms: Terms,
) -> Gradients:
    """Return the gradients of the inputs.

    With the divisor z, n = g S^T and p = (R q . n) / z^2: dq = R^-1 n / z - p k',  dS = sum R q g^T / z,
    dk' = -sum p q,  dk = R^-1 (v dS^T) + dk',  dv = R k dS.

    Args:
        gradient: g, the gradient of the output, (B, N, H, D).
        of_state: gradient of the returned S; None for 0.
        of_key_sum: gradient of the returned k'; None for 0.
        query: input of the forward pass.
        key: input of the forward pass.
        value: input of the forward pass.
        state: S, result of the forward pass.
        key_sum: k', result of the forward pass.
        terms: the options of the forward pass.
    """
    g = exact(gradient)
    q_normed = rms_norm(exact(query), terms.query_weight, terms)
    k_normed = rms_norm(exact(key), terms.key_weight, terms)
    q, (k, v) = feature(q_normed, terms.feature_map), _existing_features(key, value, terms)
    q_rotated = rotate(q, terms)
    divisor = (torch.einsum("bnhd,bhd->bnh", q, key_sum) + terms.eps)[..., None]
    n = torch.einsum("bnhe,bhde->bnhd", g, state) / divisor
    p = (q_rotated * n).sum(dim=-1, keepdim=True) / divisor
    d_query = (rotate(n, terms, back=True) - p * key_sum[:, None]) * slope(q_normed, terms.feature_map)
    d_state = torch.einsum("bnhd,bnhe->bhde", q_rotated / divisor, g)
    d_key_sum = -(p * q).sum(dim=1)
    d_state = d_state if of_state is None else d_state + exact(of_state)
    d_key_sum = d_key_sum if of_key_sum is None else d_key_sum + exact(of_key_sum)
    d_key = rotate(torch.einsum("bmhe,bhde->bmhd", v, d_state), terms, back=True) + d_key_sum[:, None]
    of_conv, d_space, d_time = convolve_backward(g, v, terms)
    d_value = torch.einsum("bmhd,bhde->bmhe", rotate(k, terms), d_state) + of_conv
    there = existing(key, terms)
    d_key = d_key * slope(k_normed, terms.feature_map)
    return Gradients(
        query=d_query if terms.qk_norm else d_query.to(query.dtype),
        key=d_key.where(there, 0) if terms.qk_norm else d_key.where(there, 0).to(key.dtype),
        value=d_value.where(there, 0).to(value.dtype),
        conv_space=d_space,
        conv_time=d_time,
        state=d_state,
        key_sum=d_key_sum,
    )


def exact(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def feature(x: Tensor, feature_map: str) -> Tensor:
    """Return phi(x)."""
    return x.relu() if feature_map == "relu" else F.elu(x) + 1


def slope(x: Tensor, feature_map: str) -> Tensor:
    """Return the derivative of phi at x; for ReLU it is 0 at x = 0."""
    return (x > 0).to(x.dtype) if feature_map == "relu" else x.clamp(max=0).exp()


def existing(key: Tensor, terms: Terms) -> Tensor:
    """Return a mask of the keys within `key_lengths`, (B or 1, M, 1, 1)."""
    token = torch.arange(key.shape[1], device=key.device)[None, :, None, None]
    if terms.key_lengths is None:
        return torch.ones_like(token, dtype=torch.bool)
    return token < terms.key_lengths[:, None, None, None]


def rotate(x: Tensor, terms: Terms, *, back: bool = False) -> Tensor:
    """Rotate each pair of neighbouring channels by its angle (the convention of Wan in diffusers).

    `back` rotates by the negative angle.
    """
    if terms.rope is None or terms.grid is None or terms.rope_pairs is None:
        return x
    before, x, after = by_kind(x, terms)
    frames, rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device) for n in terms.grid), indexing="ij")
    first, second = terms.grid[0], terms.grid[0] + terms.grid[1]
    positions = [frames.flatten(), first + rows.flatten(), second + columns.flatten()]
    by_axis = terms.rope.to(x.dtype).split(list(terms.rope_pairs), dim=1)
    angles = torch.cat([axis[position] for axis, position in zip(by_axis, positions, strict=True)], dim=1)
    cosine, sine = angles[:, None, :, 0], angles[:, None, :, 1] * (-1 if back else 1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
    return torch.cat((before, turned, after), dim=1) if terms.text_first or terms.text_last else turned


def by_kind(x: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Split x, (B, tokens, ...), into views of the text before the video, the video, and the text after it."""
    before, video, after = x.split((terms.text_first, x.shape[1] - text_tokens(terms), terms.text_last), dim=1)
    return before, video, after


def text_tokens(terms: Terms) -> int:
    """Return the number of text tokens."""
    return terms.text_first + terms.text_last


def rms_norm(x: Tensor, weight: Tensor | None, terms: Terms) -> Tensor:
    """Return the RMSNorm of x, (B, N, H, D), times the weight; x itself if `terms.qk_norm` is None.

    The mean square is over the channels of a head, or over all heads for "rms_norm_across_heads"; `norm_eps` is added.
    """
    if terms.qk_norm is None:
        return x
    normed = x * _reciprocal_rms(x, terms)
    return normed if weight is None else normed * _by_head(weight.to(x.dtype), x)


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, terms: Terms
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and of the weight for a gradient of the result of `rms_norm`.

    With the normalised n = x r: dx = r (dn - n mean(dn n)).
    """
    if terms.qk_norm is None:
        return gradient, None
    gradient, full = exact(gradient), exact(x)
    reciprocal = _reciprocal_rms(full, terms)
    normed = full * reciprocal
    of_weight = None
    if weight is not None:
        of_weight = (gradient * normed).sum(dim=(0, 1)).reshape(-1, weight.numel()).sum(dim=0).to(weight.dtype)
        gradient = gradient * _by_head(exact(weight), x)
    along = (gradient * normed).mean(dim=_normed_axes(terms), keepdim=True)
    return (reciprocal * (gradient - normed * along)).to(x.dtype), of_weight


def convolve(value: Tensor, terms: Terms) -> Tensor:
    """Return the sum of both depth-wise convolutions of the values, (B, N, H, D), with zero padding; 0 for text."""
    value = by_kind(value, terms)[1]
    out = torch.zeros_like(value)
    if terms.conv_space is not None:
        pictures, weight = _pictures(value, terms), _depth_wise(terms.conv_space, value)
        filtered = F.conv2d(pictures, weight, padding="same", groups=len(weight))
        out = out + _tokens(filtered, value)
    if terms.conv_time is not None:
        strips, weight = _strips(value, terms), _depth_wise(terms.conv_time[..., None], value)
        out = out + _tokens(F.conv2d(strips, weight, padding="same", groups=len(weight)), value)
    return _with_text(out, terms)


def convolve_backward(gradient: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the values and of both weights for a gradient of the result of `convolve`.

    Without any weights the gradient of the values is 0.
    """
    gradient, value = by_kind(gradient, terms)[1], by_kind(value, terms)[1]
    of_value, of_space, of_time = torch.zeros_like(value), None, None
    if terms.conv_space is not None:
        weight = _depth_wise(terms.conv_space, value)
        of_pictures, filters = _conv_backward(_pictures(gradient, terms), _pictures(value, terms), weight)
        of_value = of_value + _tokens(of_pictures, value)
        of_space = _summed(filters, terms.conv_space)
    if terms.conv_time is not None:
        weight = _depth_wise(terms.conv_time[..., None], value)
        of_strips, filters = _conv_backward(_strips(gradient, terms), _strips(value, terms), weight)
        of_value = of_value + _tokens(of_strips, value)
        of_time = _summed(filters, terms.conv_time)
    return _with_text(of_value, terms), of_space, of_time


def _with_text(video: Tensor, terms: Terms) -> Tensor:
    """Pad the result of the video tokens with zeros for the text tokens."""
    return F.pad(video, (0, 0, 0, 0, terms.text_first, terms.text_last)) if text_tokens(terms) else video


def _existing_features(key: Tensor, value: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return phi of the normalised keys, and the values; 0 beyond `key_lengths`, even if NaN is stored there."""
    there = existing(key, terms)
    k = feature(rms_norm(exact(key), terms.key_weight, terms), terms.feature_map)
    return k.where(there, 0), exact(value).where(there, 0)


def _normed_axes(terms: Terms) -> list[int]:
    return [-2, -1] if terms.qk_norm == "rms_norm_across_heads" else [-1]


def _reciprocal_rms(x: Tensor, terms: Terms) -> Tensor:
    return (x.square().mean(dim=_normed_axes(terms), keepdim=True) + terms.norm_eps).rsqrt()


def _by_head(weight: Tensor, x: Tensor) -> Tensor:
    return weight.reshape(-1, x.shape[-1])


def _depth_wise(weight: Tensor, value: Tensor) -> Tensor:
    """Return the weights repeated for every channel of every head, (H * D, 1, rows, columns)."""
    heads, channels = value.shape[2:]
    return weight.to(value.dtype)[:, None].repeat(heads * channels // len(weight), 1, 1, 1)


def _summed(filters: Tensor, weight: Tensor) -> Tensor:
    """Sum the gradients over heads that share their weights."""
    return filters.reshape(-1, *weight.shape).sum(dim=0).to(weight.dtype)


def _pictures(value: Tensor, terms: Terms) -> Tensor:
    assert terms.grid is not None
    _, rows, columns = terms.grid
    return value.reshape(-1, rows, columns, value.shape[2] * value.shape[3]).permute(0, 3, 1, 2)


def _tokens(pictures: Tensor, value: Tensor) -> Tensor:
    """Undo `_pictures` and `_strips`."""
    return pictures.permute(0, 2, 3, 1).reshape(value.shape)


def _strips(value: Tensor, terms: Terms) -> Tensor:
    assert terms.grid is not None
    batch, tokens, heads, channels = value.shape
    frames = terms.grid[0]
    return value.reshape(batch, frames, tokens // frames, heads * channels).permute(0, 3, 1, 2)


def _conv_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    padding = [side // 2 for side in weight.shape[2:]]
    of_x = conv2d_input(x.shape, weight, gradient, padding=padding, groups=len(weight))
    of_weight = conv2d_weight(x, weight.shape, gradient, padding=padding, groups=len(weight))
    return of_x, of_weight[:, 0]
