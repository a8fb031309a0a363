"""Another forward for a module: what hooks of diffusers and accelerate keep of it, and what caches know of its class.

What of it is private to them is in `postgen.compat`; methods take it from here.
"""

from __future__ import annotations

from postgen.compat import rebind_forward, register_block_class

__all__ = ["rebind_forward", "register_block_class"]
