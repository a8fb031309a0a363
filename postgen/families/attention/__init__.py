"""How each architecture of diffusers computes self-attention over the video, so that methods can do a part otherwise.

    reader = attention_of(transformer).reader(module.processor)  # refuses a processor whose code has changed

    def compute(reader, inner, attention, *args, **kwargs):  # in the compute slot of the module, reader given
        call = reader.bind(attention, *args, **kwargs)
        reading = reader.read(call)
        if reading is None:  # cross-attention, or arguments that the file does not know
            return inner(attention, *args, **kwargs)
        query, key, value = reading.joined()  # normed and rotated as diffusers does, (B, N, H, D)
        mask = reading.mask
        del reading  # it holds the raw queries and keys
        out = dispatched(attention, query, key, value, mask)  # or what the method does instead
        return reader.finish(call, out, query.dtype)

`dispatched` is in `reading`, which says what is read. One file per architecture. Which operations are fused, sparse or
quantised is the caller's business. A whole method that does so: `docs/models.md`.
"""

from postgen.families.attention.dispatch import show_attention_call
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader, attention_of, register_attention

__all__ = ["AttentionAnatomy", "AttentionReader", "attention_of", "register_attention", "show_attention_call"]
