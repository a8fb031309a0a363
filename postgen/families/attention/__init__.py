"""The self-attention over the video in each architecture of diffusers, in parts that a method can replace.

    reader = attention_of(transformer).reader(module.processor)  # error if the code of the processor has changed

    def compute(reader, inner, attention, *args, **kwargs):  # the compute slot of the module, with its reader
        call = reader.bind(attention, *args, **kwargs)
        reading = reader.read(call)
        if reading is None:  # cross-attention, or arguments without a reading
            return inner(attention, *args, **kwargs)
        query, key, value = reading.joined()  # normed and rotated as in diffusers, (B, N, H, D)
        mask = reading.mask
        del reading  # free the raw queries and keys
        out = dispatched(attention, query, key, value, mask)  # or the computation of the method
        return reader.finish(call, out, query.dtype)

`dispatched` and the parts of a reading are in the module `reading`. Each architecture has a file of its own. The
caller decides which operations are fused, sparse or quantised. `docs/models.md` has a complete example of a method.
"""

from postgen.families.attention.dispatch import show_attention_call
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader, attention_of, register_attention

__all__ = ["AttentionAnatomy", "AttentionReader", "attention_of", "register_attention", "show_attention_call"]
